"""`step_cache`: context manager that puts a step cache of diffusers on the transformer of a pipeline."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from dit_accel.runtime.components import transformers_of

LENT = ("SD3Transformer2DModel",)
"""Transformers without `enable_cache` whose blocks diffusers' hooks know. They get the methods of `CacheMixin` while
a cache is on."""


TWO_TRANSFORMERS = (
    "not for two transformers (Wan2.2): diffusers' caches count the steps of one transformer"
)


def takes_cache(transformer: Any) -> bool:
    """Return whether step caches of diffusers can be put on this transformer."""
    return hasattr(transformer, "enable_cache") or type(transformer).__name__ in LENT


def scheduler_step(pipe: Any) -> int:
    """Return the number of the step that the scheduler of a pipeline is at."""
    return pipe.scheduler.step_index or 0


@contextlib.contextmanager
def step_cache(pipe: Any, config: Any) -> Iterator[None]:
    """Put a step cache on; take it off at the end.

    Args:
        config: a cache config of diffusers, such as `FirstBlockCacheConfig`.

    Raises:
        ValueError: a cache is on already, or diffusers has none for this model.
    """
    held, *others = transformers_of(pipe)
    if others:
        raise ValueError(f"cache: {TWO_TRANSFORMERS}")
    transformer = getattr(held, "_orig_mod", held)  # torch.compile wraps
    if not takes_cache(transformer):
        raise ValueError(
            f"cache: step caches are not available in diffusers for {type(transformer).__name__}"
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError("cache: a step cache is on already; call disable_cache() first")
    if not hasattr(transformer, "enable_cache"):
        with _lent_methods(pipe, transformer, config):
            yield
        return
    transformer.enable_cache(config)
    try:
        yield
    finally:
        if transformer.is_cache_enabled:
            transformer.disable_cache()


@contextlib.contextmanager
def _lent_methods(pipe: Any, transformer: Any, config: Any) -> Iterator[None]:
    """Put a step cache on Stable Diffusion 3, whose pipeline has no cache context either.

    Its last block returns no text, where diffusers' hooks compute a residual of it. The text that comes in
    takes its place; nothing reads it.
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
        # Guidance is in the batch, so that one context holds all of a step.
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
