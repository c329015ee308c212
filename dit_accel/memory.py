"""`estimate_memory`: bytes of the caches of region-adaptive sampling in a run."""

import copy
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel.config import RASConfig
from dit_accel.models import family_of
from dit_accel.ras import memory
from dit_accel.runtime.caller import steps_of
from dit_accel.runtime.components import parts_of, split
from dit_accel.runtime.target import transformer_of


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of region-adaptive sampling in a run, in bytes."""

    kv_bytes: int
    """Bytes of cached keys and values, all contexts together."""
    output_bytes: int
    """Bytes of cached outputs."""
    working_bytes: int
    """Bytes that are reserved for a call of the transformer."""
    free_bytes: int
    """Free bytes on the pipeline's device now."""
    kv_predictor: str
    """Predictor of keys and values in the run: "linear" or "hold"."""
    fits: bool
    """True if the caches fit. Otherwise region-adaptive sampling is off for the run."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all caches."""
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
    """Return the memory that region-adaptive sampling will use in a run.

    With two transformers, each caches values for its own steps, and the larger estimate is returned.

    Args:
        pipe: a supported pipeline; acceleration need not be on.
        height, width, num_frames: size of the output, as in the call of the pipeline.
        ras: settings, as in `enable`.
        num_inference_steps: number of steps, which decides about kv_predictor="auto".
        batch_size: number of prompts times images per prompt.
        guidance: whether classifier-free guidance is on.
        max_sequence_length: number of text tokens; they are cached in Lumina-Image 2.0 only.

    Raises:
        ValueError: a size, a number or a config is not accepted.
    """
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
    parts = parts_of(pipe)
    estimates = []
    for name, x in split("ras", ras, parts).items():
        if (config := RASConfig.load(x)) is None:
            continue
        transformer = transformer_of(parts[name])
        steps = _steps(pipe, transformer, num_inference_steps)
        estimates.append(
            _estimate(
                pipe,
                transformer,
                config,
                steps,
                (height, width, num_frames),
                batch_size,
                guidance,
                max_sequence_length,
            )
        )
    if not estimates:
        raise ValueError(f"ras={ras!r}: off; accepted are settings of region-adaptive sampling")
    # The caches of the first transformer are freed before the second one runs.
    most = max(estimates, key=lambda x: x.total_bytes)
    return replace(most, fits=all(x.fits for x in estimates))


def _steps(pipe: Any, transformer: Any, num_inference_steps: int) -> int:
    """Return the number of steps of a run that call this transformer."""
    if len(parts_of(pipe)) == 1:
        return num_inference_steps
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    begin, end = steps_of(pipe, transformer, scheduler.timesteps)
    return end - begin


def _estimate(
    pipe: Any,
    transformer: Any,
    config: RASConfig,
    num_inference_steps: int,
    size: tuple[int, int, int],
    batch_size: int,
    guidance: bool,
    max_sequence_length: int,
) -> MemoryEstimate:
    family = family_of(transformer)
    latents = torch.empty(family.latent_shape(pipe, *size), device="meta", dtype=transformer.dtype)
    tokens = math.prod(family.token_grid(transformer, latents))
    if tokens < 1:
        raise ValueError(
            f"height={size[0]}, width={size[1]}: smaller than one token; accepted are larger sizes"
        )
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
    kinds = 1 if config.predictor == "hold" else 2
    return MemoryEstimate(
        kv_bytes=plan.kv_bytes,
        output_bytes=batch_size * halves * outputs * itemsize * kinds,
        working_bytes=plan.working_bytes,
        free_bytes=plan.free_bytes,
        kv_predictor="linear" if plan.linear_kv else "hold",
        fits=plan.fits,
    )
