"""Context manager that enables a step cache of diffusers on the transformer of a pipeline."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from dit_accel.runtime.components import transformers_of

WITHOUT_CACHE_MIXIN = ("SD3Transformer2DModel",)
"""Class names of transformers without `enable_cache` whose blocks the cache hooks of diffusers support. The methods of
`CacheMixin` are added to them while a cache is on."""

TWO_TRANSFORMERS = "does not support two transformers (Wan2.2), because caches of diffusers count the steps of one transformer"


def takes_cache(transformer: Any) -> bool:
    """Return whether step caches of diffusers support this transformer."""
    return hasattr(transformer, "enable_cache") or type(transformer).__name__ in WITHOUT_CACHE_MIXIN


def scheduler_step(pipe: Any) -> int:
    """Return the index of the current step of the scheduler of a pipeline."""
    return pipe.scheduler.step_index or 0


@contextlib.contextmanager
def step_cache(pipe: Any, config: Any) -> Iterator[None]:
    """Enable a step cache inside the block.

    Args:
        pipe: a loaded pipeline.
        config: a cache config of diffusers, such as `FirstBlockCacheConfig`.

    Raises:
        ValueError: a cache is already enabled, or diffusers has no step cache for this model.
    """
    held, *others = transformers_of(pipe)
    if others:
        raise ValueError(f"cache={type(config).__name__}: {TWO_TRANSFORMERS}")
    transformer = getattr(held, "_orig_mod", held)  # the model inside the wrapper of torch.compile
    if not takes_cache(transformer):
        raise ValueError(
            f"cache={type(config).__name__}: diffusers has no step cache for {type(transformer).__name__}"
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            f"cache={type(config).__name__}: a step cache is already enabled; call disable_cache() first"
        )
    if not hasattr(transformer, "enable_cache"):
        with _cache_on_sd3(pipe, transformer, config):
            yield
        return
    transformer.enable_cache(config)
    try:
        yield
    finally:
        if transformer.is_cache_enabled:
            transformer.disable_cache()


@contextlib.contextmanager
def _cache_on_sd3(pipe: Any, transformer: Any, config: Any) -> Iterator[None]:
    """Enable a step cache on Stable Diffusion 3, whose transformer and pipeline do not support caches in diffusers.

    The last block returns no text, but the hooks of diffusers compute a residual of the text. The block returns its input
    text instead, which nothing reads.
    """
    from diffusers import CacheMixin

    last = transformer.transformer_blocks[-1]
    forward, context = last.forward, contextlib.ExitStack()

    @functools.wraps(forward)
    def with_text(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        text, image = forward(*args, **kwargs)
        return kwargs["encoder_hidden_states"] if text is None else text, image

    def enter(*_: Any) -> None:
        step, scheduler = scheduler_step(pipe), pipe.scheduler
        # Both halves of guidance are in one batch, so a step needs one context only.
        place = {
            "step_index": step,
            "sigma": float(scheduler.sigmas[step]),
            "num_inference_steps": len(scheduler.timesteps),
        }
        context.enter_context(CacheMixin.cache_context(transformer, "all", **place))

    with contextlib.ExitStack() as undo:
        undo.callback(vars(last).pop, "forward", None)
        last.forward = with_text
        for name in ("is_cache_enabled", "_cache_config", "_reset_stateful_cache"):
            undo.callback(vars(transformer).pop, name, None)
        transformer.is_cache_enabled = False
        transformer._reset_stateful_cache = functools.partial(
            CacheMixin._reset_stateful_cache, transformer
        )
        undo.callback(pipe.transformer.register_forward_pre_hook(enter).remove)
        leave = pipe.transformer.register_forward_hook(lambda *_: context.close(), always_call=True)
        undo.callback(leave.remove)
        CacheMixin.enable_cache(transformer, config)
        undo.callback(CacheMixin.disable_cache, transformer)
        transformer.is_cache_enabled = True
        yield
