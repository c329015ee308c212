"""`run_batch` and `run_latents`: one pipeline call for the samples of a batch, with its seconds by phase."""

import contextlib
import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from dit_accel import control
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling import media
from dit_accel.sampling.picture import read_picture
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.settings import FRAMES, Kind

ONE_PROMPT = ("WanVACEPipeline",)
"""Pipelines of diffusers that take one prompt in a call, as a string, with one generator."""


@dataclass(frozen=True)
class BatchResult:
    """Result of one pipeline call."""

    samples: tuple[Sample, ...]
    frames: Float[np.ndarray, "b t h w 3"]
    """Raw frames of each sample, in [0, 1]."""
    seconds: dict[str, float]
    """Seconds of the call: text, denoise, decode, total."""
    summary: control.Summary

    def pictures(self, i: int) -> UInt8[np.ndarray, "t h w 3"]:
        """Return the frames of sample `i` as pictures.

        Raises:
            RuntimeError: values that are not finite.
        """
        if not np.isfinite(self.frames[i]).all():
            raise RuntimeError(
                f"sample {self.samples[i].id!r}: the model returned values that are not finite (does it need "
                "another dtype?)"
            )
        return media.to_uint8(self.frames[i])


def media_kind(pipe: Any) -> Kind:
    """Return whether the pipeline makes images or clips."""
    return "clips" if any(hasattr(pipe, name) for name in FRAMES) else "images"


@contextlib.contextmanager
def phase_timer(pipe: Any) -> Iterator[dict[str, float]]:
    """Measure seconds for text, denoise and decode of the pipeline calls inside; filled in at the end."""
    marks: list[float] = []

    device = torch.device(pipe._execution_device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def note(*_: Any) -> None:
        marks.append(now())

    hooks = [
        hook
        for x in transformers_of(pipe)
        for hook in (x.register_forward_pre_hook(note), x.register_forward_hook(note))
    ]
    seconds: dict[str, float] = {}
    start = now()
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
    end = now()
    if marks:
        seconds.update(text=marks[0] - start, denoise=marks[-1] - marks[0], decode=end - marks[-1])
    seconds["total"] = end - start


def run_batch(pipe: Any, samples: Sequence[Sample], **overrides: Any) -> BatchResult:
    """Make the samples of one batch in one pipeline call.

    Each sample has a generator of its own, so that its noise does not depend on the others.

    Args:
        pipe: a loaded pipeline.
        samples: samples of one size, with a negative prompt each or none (see `plan.plan_batches`).
        overrides: fields of `Sampling` that replace those of the samples.

    Raises:
        RuntimeError: the memory does not suffice.
    """
    result, seconds = _called(pipe, samples, "np", overrides)
    frames = result.frames if hasattr(result, "frames") else result.images[:, None]
    return BatchResult(tuple(samples), frames, seconds, control.summary(pipe))


def run_latents(pipe: Any, samples: Sequence[Sample]) -> Float[torch.Tensor, "b c *thw"]:
    """Return the latents of a batch, as the transformer makes them and before the VAE decodes them.

    Args:
        pipe, samples: as in `run_batch`.

    Raises:
        RuntimeError: the memory does not suffice.
    """
    result, _ = _called(pipe, samples, "latent", {})
    return result.frames if hasattr(result, "frames") else result.images


def _called(
    pipe: Any, samples: Sequence[Sample], output_type: str, overrides: dict[str, Any]
) -> tuple[Any, dict[str, float]]:
    """Return the result of one pipeline call, and its seconds by phase."""
    arguments = samples[0].sampling.overridden(**overrides).call_arguments()
    negative = [x.sampling.negative_prompt for x in samples]
    if negative[0] is not None:
        arguments["negative_prompt"] = negative
    if "guidance_scale" in arguments and _has_true_guidance(pipe):
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
    if "image" in arguments:
        arguments["image"] = read_picture(arguments["image"])
    # Generators live on the CPU: the same noise on every device.
    generators: Any = [torch.Generator("cpu").manual_seed(x.seed) for x in samples]
    prompts: Any = [x.record.prompt for x in samples]
    if type(pipe).__name__ in ONE_PROMPT:
        [prompts], [generators] = prompts, generators
        if negative[0] is not None:
            [arguments["negative_prompt"]] = negative
    try:
        with phase_timer(pipe) as seconds:
            result = pipe(
                prompt=prompts, generator=generators, output_type=output_type, **arguments
            )
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of memory with {len(samples)} samples in a call ({str(error).splitlines()[0]}); what is "
            "finished stays, run it again with a smaller batch_size or size"
        ) from error
    return result, seconds


def _has_true_guidance(pipe: Any) -> bool:
    """Return whether the scale of classifier-free guidance has a name of its own, as in Qwen-Image. `guidance_scale` is
    then for models that guidance was distilled into, which get it as an input."""
    config = getattr(pipe.transformer, "config", None)
    distilled = getattr(config, "guidance_embeds", False)
    return not distilled and "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters
