"""Prompts to clips and images on disk: load, generate, time the phases, write them and sidecar JSON."""

import contextlib
import importlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import control
from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.environment import machine, versions
from dit_accel.files import check_writable, write_json
from dit_accel.sampling import media
from dit_accel.sampling.focus import focus_masks, write_focus
from dit_accel.sampling.picture import read_picture
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.settings import Dtype, Sampling, check_fps, check_seed
from dit_accel.sampling.settings import with_steps as with_steps

FORMAT_VERSION = 1
CLIP_KINDS = ("mp4", "gif", "png")
PIPELINES = {
    "WanPipeline": "wan.SparseWanPipeline",
    "WanImageToVideoPipeline": "wan_i2v.SparseWanImageToVideoPipeline",
    "StableDiffusion3Pipeline": "sd3.SparseStableDiffusion3Pipeline",
    "LuminaPipeline": "lumina.SparseLuminaPipeline",
    "LuminaText2ImgPipeline": "lumina.SparseLuminaPipeline",
    "Lumina2Pipeline": "lumina2.SparseLumina2Pipeline",
    "Lumina2Text2ImgPipeline": "lumina2.SparseLumina2Pipeline",
}
"""By the class name in model_index.json."""


@contextlib.contextmanager
def phase_timer(pipe: Any) -> Iterator[dict[str, float]]:
    """Seconds for text, denoise and decode of the pipeline calls inside, filled in at the end."""
    marks: list[float] = []

    device = torch.device(pipe._execution_device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def note(*_: Any) -> None:
        marks.append(now())

    before = pipe.transformer.register_forward_pre_hook(note)
    after = pipe.transformer.register_forward_hook(note)
    seconds: dict[str, float] = {}
    start = now()
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()
    end = now()
    if marks:
        seconds.update(text=marks[0] - start, denoise=marks[-1] - marks[0], decode=end - marks[-1])
    seconds["total"] = end - start


def run_batch(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
    negative_prompts: Sequence[str] | None = None,
) -> tuple[np.ndarray, dict[str, float], control.Summary]:
    """One call: raw frames `[B, T, H, W, 3]` in [0, 1], seconds per phase, and what was spared.

    Args:
        seeds: of the samples. Each has a generator of its own, so that its noise does not depend on the
            others in the batch.
        negative_prompts: of the samples; None: that of `sampling` for all of them.
    """
    arguments = sampling.call_arguments()
    if negative_prompts is None and sampling.negative_prompt is not None:
        negative_prompts = [sampling.negative_prompt] * len(prompts)
    if negative_prompts is not None:
        arguments["negative_prompt"] = list(negative_prompts)
    if sampling.image is not None:
        arguments["image"] = read_picture(sampling.image)
    # Generators live on the CPU: the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with phase_timer(pipe) as seconds:
        result = pipe(prompt=list(prompts), generator=generators, output_type="np", **arguments)
    frames = result.frames if hasattr(result, "frames") else result.images[:, None]
    return frames, seconds, control.summary(pipe)


def run_once(
    pipe: Any, prompt: str, sampling: Sampling, seed: int
) -> tuple[np.ndarray, dict[str, float], control.Summary]:
    """One clip or image: raw frames `[T, H, W, 3]` in [0, 1], seconds per phase, and what was spared."""
    frames, seconds, summary = run_batch(pipe, [prompt], sampling, [seed])
    return frames[0], seconds, summary


def resolved_device(device: str) -> str:
    """ "auto" is cuda where there is one, else cpu."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved_dtype(dtype: Dtype, device: str) -> Dtype:
    """ "auto" is bf16 on CUDA and fp32 elsewhere."""
    if dtype != "auto":
        return dtype
    return "bf16" if device.startswith("cuda") else "fp32"


def pipeline_class(model: str | os.PathLike, **hub: Any) -> Any:
    """The sparse pipeline that runs this repository.

    Raises:
        ValueError: it cannot be reached, or holds another kind of pipeline.
    """
    from dit_accel.pipelines.base import read_index

    found = read_index(model, "model", **hub).get("_class_name")
    if found not in PIPELINES:
        raise ValueError(
            f"model={str(model)!r}: holds a {found}; accepted are {', '.join(PIPELINES)}"
        )
    module, name = PIPELINES[found].split(".")
    return getattr(importlib.import_module(f"dit_accel.pipelines.{module}"), name)


def load(
    model: str | os.PathLike,
    *,
    sla: SLAConfig | SLACheckpoint | str | None = "balanced",
    ras: RASConfig | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    **kwargs: Any,
) -> Any:
    """A sparse pipeline on a device."""
    where = resolved_device(device)
    chosen = resolved_dtype(dtype, where)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r}: not available here ({str(error).splitlines()[0]})"
        ) from None
    cls = pipeline_class(model, **{k: x for k, x in kwargs.items() if k == "revision"})
    pipe: Any = cls.from_pretrained(model, sla=sla, ras=ras, dtype=types[chosen], **kwargs)
    return pipe.to(where)


def _free_index(directory: Path) -> int:
    """First number that no file in the folder begins with, so that nothing is overwritten."""
    taken = [int(p.name[:4]) for p in directory.iterdir() if p.name[:4].isdigit()]
    return max(taken, default=-1) + 1


def generate(
    pipe: Any,
    prompts: list[PromptRecord],
    *,
    output_dir: str | os.PathLike,
    model: str,
    sampling: Sampling,
    seed: int = 0,
    kind: str = "auto",
    fps: float = 16.0,
    save_focus: bool = False,
    extras: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Generate one clip or image per prompt; each gets a numbered file and a sidecar JSON.

    Args:
        pipe: a loaded pipeline (see `load`).
        prompts: prompt i uses its own seed, or `seed + i`.
        output_dir: created if needed; numbering goes on after what is there.
        model: what to write down as the model's name.
        sampling: arguments of the pipeline call.
        kind: "mp4", "gif" or "png" (frames); "auto" is png for images and mp4 for clips.
        fps: of the written clip.
        save_focus: also write where region-adaptive sampling worked, see `write_focus`.
        extras: what else was set on the pipeline, for the sidecars (see `extras.prepare`).

    Returns:
        The sidecar records, with `files` and `sidecar` as paths.
    """
    if kind not in ("auto", *CLIP_KINDS):
        raise ValueError(f"kind={kind!r}: accepted are auto, {', '.join(CLIP_KINDS)}")
    session = control.session_of(pipe)
    if save_focus and (session is None or session.ras is None):
        raise ValueError("save_focus: region-adaptive sampling is off; accepted with ras=...")
    check_fps(fps)
    check_seed(seed, len(prompts))
    settings = [sampling.overridden(**item.sampling_arguments()) for item in prompts]
    for used in settings:
        pipe.check_sizes(**used.call_arguments())
    folder = check_writable(output_dir, "output_dir")
    first = _free_index(folder)
    records = []
    for i, (item, used) in enumerate(zip(prompts, settings, strict=True)):
        used_seed = item.seed if item.seed is not None else seed + i
        frames, seconds, summary = run_once(pipe, item.prompt, used, used_seed)
        stem = folder / f"{first + i:04d}"
        pictures = media.to_uint8(frames)
        chosen = ("png" if len(frames) == 1 else "mp4") if kind == "auto" else kind
        files = media.write_clip(stem, pictures, kind=chosen, fps=fps)
        masks = focus_masks(pipe) if save_focus else {}
        if masks:
            files += write_focus(stem, pictures, masks, fps=fps)
        record = {
            "format_version": FORMAT_VERSION,
            "prompt": item.prompt,
            "seed": used_seed,
            "model": model,
            "sampling": used.call_arguments(),
            **(extras or {}),
            "frames": list(frames.shape),
            "fps": fps,
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "device": str(pipe.transformer.device),
            "seconds": seconds,
            "acceleration": summary.to_dict(),
            "versions": versions(),
            "machine": machine(),
            "files": [path.name for path in files],
        }
        write_json(stem.with_suffix(".json"), record)
        records.append(
            {**record, "files": [str(p) for p in files], "sidecar": str(stem.with_suffix(".json"))}
        )
    return records
