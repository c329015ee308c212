"""`enable`, `disable`, `summary`, `estimate_memory`: acceleration of a pipeline, put on and taken off."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel.checkpoint.file import SLACheckpoint, settings_of
from dit_accel.checkpoint.identity import identity_of, weights_of
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.models import FAMILIES, Family, family_of
from dit_accel.ras import memory
from dit_accel.runtime.install import Session
from dit_accel.summaries import Summary, summarise


def session_of(pipe: Any) -> Session | None:
    """The acceleration on this pipeline's transformer, if any (shared components share it)."""
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        return None
    # What torch.compile(transformer) returns wraps the module that was enabled.
    module: Any = getattr(transformer, "_orig_mod", transformer)
    for hook in module._forward_pre_hooks.values():
        if isinstance(owner := getattr(hook, "__self__", None), Session):
            return owner
    return None


def _family(pipe: Any) -> Family:
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "pipe.transformer_2: two-transformer pipelines (Wan2.2) are not supported; accepted: None"
        )
    if not isinstance(getattr(pipe, "transformer", None), nn.Module):
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no transformer; accepted are pipelines of {', '.join(FAMILIES)}"
        )
    return family_of(pipe.transformer)


def enable(
    pipe: Any,
    *,
    ras: RASConfig | dict | str | os.PathLike | None = None,
    sla: SLAConfig | SLACheckpoint | dict | str | os.PathLike | None = None,
) -> None:
    """Accelerate a diffusers pipeline in place. One method can be added to the other later.

    Args:
        pipe: a pipeline with a supported transformer: Wan2.1, Stable Diffusion 3 and 3.5,
            Lumina-Next, Lumina-Image 2.0.
        ras: region-adaptive sampling: an `RASConfig`, a preset ("quality", "balanced", "fast",
            "paper"), a YAML file, or a dict of `RASConfig` fields.
        sla: sparse attention: an `SLAConfig`, a preset ("quality", "balanced", "fast"),
            a YAML file, a dict of `SLAConfig` fields, or what `save_sla` wrote (the folder or the file).

    Raises:
        ValueError: a bad argument, a pipeline that is not supported, an adapter made for another model, or
            a method that is on already. The pipeline is then as before.
    """
    if ras is None and sla is None:
        raise ValueError(
            "ras=None, sla=None: nothing to enable; accepted are a preset name, a config, a YAML file, a dict, an adapter's folder"
        )
    ras_config = None if ras is None else RASConfig.load(ras)
    settings = None if sla is None else settings_of(sla)
    adapter = settings if isinstance(settings, SLACheckpoint) else None
    sla_config = settings.config if isinstance(settings, SLACheckpoint) else settings
    family = _family(pipe)
    before = session_of(pipe)
    if before is not None:
        for name, new, old in (("ras", ras_config, before.ras), ("sla", sla_config, before.sla)):
            if new is not None and old is not None:
                raise ValueError(
                    f"{name}: already enabled on this transformer; call disable() first"
                )
    if adapter is not None:
        try:
            adapter.base.check(identity_of(pipe.transformer))
        except ValueError as error:
            raise ValueError(f"sla: this adapter was {error}") from None
    if before is not None:
        ras_config = ras_config or before.ras_config
        sla_config = sla_config or before.sla_config
        before.remove()
    try:
        session = Session(pipe, family, ras=ras_config, sla=sla_config)
        _load(session, adapter, before)
    except Exception:
        if (unfinished := session_of(pipe)) is not None:
            unfinished.remove()
        if before is not None:  # what was on stays on
            _load(Session(pipe, family, ras=before.ras_config, sla=before.sla_config), None, before)
        raise


def _load(session: Session, adapter: SLACheckpoint | None, before: Session | None) -> None:
    """Weights of sparse attention, from the adapter or from the session that this one replaces."""
    if session.sla is None:
        return
    if adapter is not None:
        for name, weights in adapter.layer_weights().items():
            session.sla.modules[name].load_state_dict(weights)
    elif before is not None and before.sla is not None:
        for name, module in before.sla.modules.items():
            session.sla.modules[name].router = module.router
            if module.calibrated:
                session.sla.modules[name].load_state_dict(weights_of(module))


def disable(pipe: Any) -> None:
    """Take the acceleration off; the transformer is then exactly what it was. No-op if it is off."""
    session = session_of(pipe)
    if session is not None:
        session.remove()


def summary(pipe: Any, *, strict: bool = False) -> Summary:
    """What ran sparse or on some tokens only, what ran dense, and why, in the last run.

    Args:
        pipe: a pipeline, enabled or not.
        strict: raise RuntimeError if a layer that the schedule lets run sparse never did, or if
            region-adaptive sampling is on and no step ran on some of the tokens only.
    """
    session = session_of(pipe)
    if session is None:
        if strict:
            raise RuntimeError("acceleration is off: call enable() first")
        return Summary(enabled=False, config={}, layers=[])
    result = summarise(session)
    if strict:
        never = [x for x in result.layers if x.scheduled and not x.sparse_calls]
        if never:
            raise RuntimeError(
                "never sparse although scheduled: "
                + "; ".join(f"{x.name} ({', '.join(x.dense_calls) or 'not called'})" for x in never)
            )
        if result.ras is not None and not result.ras.ras_steps:
            reasons = ", ".join(result.ras.dense_calls) or "not called"
            raise RuntimeError(f"region-adaptive sampling never left a token out ({reasons})")
    return result


@dataclass(frozen=True)
class MemoryEstimate:
    """What region-adaptive sampling will keep, in bytes."""

    kv_bytes: int
    """Cached keys and values of all contexts."""
    output_bytes: int
    """Cached outputs."""
    working_bytes: int
    """Room left for the transformer's own work."""
    free_bytes: int
    """Free on the pipeline's device now."""
    kv_predictor: str
    """"linear" or "hold", as the run would use it."""
    fits: bool
    """If not, region-adaptive sampling goes off for that run."""

    @property
    def total_bytes(self) -> int:
        """Of the caches."""
        return self.kv_bytes + self.output_bytes


def estimate_memory(
    pipe: Any,
    *,
    height: int,
    width: int,
    num_frames: int = 1,
    ras: RASConfig | dict | str | os.PathLike = "balanced",
    num_inference_steps: int = 50,
    batch_size: int = 1,
    guidance: bool = True,
    max_sequence_length: int = 256,
) -> MemoryEstimate:
    """What `enable(pipe, ras=...)` will keep during a run of this size.

    Args:
        pipe: a supported pipeline; it need not be enabled.
        height, width, num_frames: as in its call.
        ras: as in `enable`.
        num_inference_steps: decides on kv_predictor="auto".
        batch_size: prompts times images per prompt.
        guidance: whether classifier-free guidance is on (two contexts).
        max_sequence_length: text tokens; they are cached in Lumina-Image 2.0 only.

    Raises:
        ValueError: a size, a count or a config that is not accepted.
    """
    config = RASConfig.load(ras)
    family = _family(pipe)
    sizes = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "batch_size": batch_size,
        "max_sequence_length": max_sequence_length,
    }
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: accepted is an int >= 1")
    transformer = pipe.transformer
    latents = torch.empty(
        family.latent_shape(pipe, height, width, num_frames), device="meta", dtype=transformer.dtype
    )
    tokens = math.prod(family.token_grid(transformer, latents))
    if tokens < 1:
        raise ValueError(f"height={height}, width={width}: less than one token of this model")
    itemsize = transformer.dtype.itemsize
    halves = 2 if guidance else 1
    contexts = halves if family.separate_guidance else 1
    plan = memory.plan_cache(
        config,
        num_inference_steps,
        memory.cached_layers(family.self_attention(transformer), tokens, max_sequence_length),
        rows=batch_size * halves // contexts,
        contexts=contexts,
        itemsize=itemsize,
        free=memory.free_bytes(torch.device(pipe._execution_device)),
    )
    outputs = (
        latents[0].numel() // transformer.config.in_channels * family.output_channels(transformer)
    )
    kinds = 2 if config.predictor == "linear" else 1
    return MemoryEstimate(
        kv_bytes=plan.kv_bytes,
        output_bytes=batch_size * halves * outputs * itemsize * kinds,
        working_bytes=plan.working_bytes,
        free_bytes=plan.free_bytes,
        kv_predictor="linear" if plan.linear_kv else "hold",
        fits=plan.fits,
    )
