"""Pipeline call for the samples of a batch, with the seconds of each phase."""

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
from dit_accel.sampling.input_image import read_input_image
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.settings import FRAMES, Kind

ONE_PROMPT = ("WanVACEPipeline",)
"""Class names of diffusers pipelines that take one prompt per call, as a string, with one generator."""


@dataclass(frozen=True)
class BatchResult:
    """Result of one pipeline call."""

    samples: tuple[Sample, ...]
    frames: Float[np.ndarray, "b t h w 3"]
    """Frames of each sample, with values in [0, 1]."""
    seconds: dict[str, float]
    """Seconds of the phases "text", "denoise" and "decode", and "total"."""
    summary: control.Summary

    def pictures(self, i: int) -> UInt8[np.ndarray, "t h w 3"]:
        """Return the frames of sample `i` as 8-bit RGB.

        Raises:
            RuntimeError: the frames have values that are not finite.
        """
        if not np.isfinite(self.frames[i]).all():
            raise RuntimeError(
                f"sample {self.samples[i].id!r}: the model returned values that are not finite; try another dtype"
            )
        return media.to_uint8(self.frames[i])


def media_kind(pipe: Any) -> Kind:
    """Return "clips" if the pipeline generates video, else "images"."""
    return "clips" if any(hasattr(pipe, name) for name in FRAMES) else "images"


@contextlib.contextmanager
def phase_timer(pipe: Any) -> Iterator[dict[str, float]]:
    """Measure the phases of the pipeline call inside the block. The yielded dict is filled on exit, see `BatchResult.seconds`."""
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
    """Generate the samples of one batch in one pipeline call.

    Each sample has its own generator, so its noise does not depend on the other samples.

    Args:
        pipe: a loaded pipeline.
        samples: samples of one size; either all have a negative prompt or none has one (see `plan.plan_batches`).
        overrides: fields of `Sampling` that replace those of the samples.

    Raises:
        RuntimeError: out of memory.
    """
    result, seconds = _called(pipe, samples, "np", overrides)
    frames = result.frames if hasattr(result, "frames") else result.images[:, None]
    return BatchResult(tuple(samples), frames, seconds, control.summary(pipe))


def run_latents(pipe: Any, samples: Sequence[Sample]) -> Float[torch.Tensor, "b c *thw"]:
    """Return the latents of a batch before the VAE decodes them.

    Args:
        pipe, samples: as in `run_batch`.

    Raises:
        RuntimeError: out of memory.
    """
    result, _ = _called(pipe, samples, "latent", {})
    return result.frames if hasattr(result, "frames") else result.images


def _called(
    pipe: Any, samples: Sequence[Sample], output_type: str, overrides: dict[str, Any]
) -> tuple[Any, dict[str, float]]:
    """Return the output of one pipeline call, and the seconds of each phase."""
    arguments = samples[0].sampling.overridden(**overrides).call_arguments()
    negative = [x.sampling.negative_prompt for x in samples]
    if negative[0] is not None:
        arguments["negative_prompt"] = negative
    if "guidance_scale" in arguments and _has_true_guidance(pipe):
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
    if "image" in arguments:
        arguments["image"] = read_input_image(arguments["image"])
    # CPU generators draw the same noise for every device.
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
            f"out of memory with {len(samples)} samples in a call ({str(error).splitlines()[0]}); finished samples are "
            "kept, run it again with a smaller batch_size or size"
        ) from error
    return result, seconds


def _has_true_guidance(pipe: Any) -> bool:
    """Return whether the pipeline names the scale of classifier-free guidance `true_cfg_scale`, as Qwen-Image does.

    In such pipelines `guidance_scale` is an input of models that were distilled for guidance.
    """
    config = getattr(pipe.transformer, "config", None)
    distilled = getattr(config, "guidance_embeds", False)
    return not distilled and "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters
