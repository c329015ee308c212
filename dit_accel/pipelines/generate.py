"""Prompts to clips and images on disk: load, generate, time the phases, write them and sidecar JSON."""

import contextlib
import importlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dit_accel import control, media
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.environment import machine, versions
from dit_accel.files import check_writable, write_json
from dit_accel.pipelines.focus import focus_masks, write_focus
from dit_accel.sla.files import Adapter

FORMAT_VERSION = 1
CLIP_KINDS = ("mp4", "gif", "png")
PIPELINES = {
    "WanPipeline": "wan.SparseWanPipeline",
    "StableDiffusion3Pipeline": "sd3.SparseStableDiffusion3Pipeline",
    "LuminaPipeline": "lumina.SparseLuminaPipeline",
    "LuminaText2ImgPipeline": "lumina.SparseLuminaPipeline",
    "Lumina2Pipeline": "lumina2.SparseLumina2Pipeline",
    "Lumina2Text2ImgPipeline": "lumina2.SparseLumina2Pipeline",
}
"""By the class name in model_index.json."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Arguments of one pipeline call; None leaves the pipeline's own default."""

    height: int | None = None
    """Pixels; must be divisible by the model's step."""
    width: int | None = None
    num_frames: int | None = None
    """Temporal factor * k + 1 (4k+1 for Wan2.1)."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    """Text tokens."""

    def call_arguments(self) -> dict[str, Any]:
        """The given ones, under the pipeline's names."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def filled(self, defaults: dict[str, Any]) -> "Sampling":
        """With `defaults` where nothing was given."""
        return Sampling(**{**defaults, **self.call_arguments()})


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Prompts from a .txt (one a line) or .jsonl file (`prompt`, `negative_prompt`, `seed`)."""
    path = Path(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"prompts_file={str(path)!r}: not a readable text file ({error})"
        ) from None
    if not lines:
        raise ValueError(f"prompts_file={str(path)!r}: holds no prompt")
    if path.suffix != ".jsonl":
        return [Prompt(line.strip()) for line in lines]
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(Prompt(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"prompts_file={str(path)!r}, line {number}: accepted is a JSON object with prompt "
                f"and optionally negative_prompt, seed ({error})"
            ) from None
    return prompts


@contextlib.contextmanager
def phase_timer(pipe: Any) -> Iterator[dict[str, float]]:
    """Seconds for text, denoise and decode of the pipeline calls inside, filled in at the end."""
    marks: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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


def run_once(
    pipe: Any, prompt: str, sampling: Sampling, seed: int
) -> tuple[np.ndarray, dict[str, float], control.Summary]:
    """One clip or image: raw frames `[T, H, W, 3]` in [0, 1], seconds per phase, and what was spared."""
    # The generator lives on the CPU: the same noise on every device.
    generator = torch.Generator("cpu").manual_seed(seed)
    with phase_timer(pipe) as seconds:
        result = pipe(
            prompt=prompt, generator=generator, output_type="np", **sampling.call_arguments()
        )
    frames = result.frames[0] if hasattr(result, "frames") else result.images[:1]
    return frames, seconds, control.summary(pipe)


def resolved_device(device: str) -> str:
    """ "auto" is cuda where there is one, else cpu."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def pipeline_class(model: str | os.PathLike, **hub: Any) -> Any:
    """The sparse pipeline that runs this repository.

    Raises:
        ValueError: it cannot be reached, or holds another kind of pipeline.
    """
    from dit_accel.pipelines.base import read_index

    found = read_index(model, **hub).get("_class_name")
    if found not in PIPELINES:
        raise ValueError(
            f"model={str(model)!r}: holds a {found}; accepted are {', '.join(PIPELINES)}"
        )
    module, name = PIPELINES[found].split(".")
    return getattr(importlib.import_module(f"dit_accel.pipelines.{module}"), name)


def load(
    model: str | os.PathLike,
    *,
    sla: SLAConfig | Adapter | str | None = "balanced",
    ras: RASConfig | None = None,
    device: str = "auto",
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    **kwargs: Any,
) -> Any:
    """A sparse pipeline on a device; dtype "auto" is bf16 on CUDA and fp32 elsewhere."""
    where = resolved_device(device)
    chosen = ("bf16" if where.startswith("cuda") else "fp32") if dtype == "auto" else dtype
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
    prompts: list[Prompt],
    *,
    output_dir: str | os.PathLike,
    model: str,
    sampling: Sampling,
    seed: int = 0,
    kind: str = "auto",
    fps: float = 16.0,
    save_focus: bool = False,
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

    Returns:
        The sidecar records, with `files` and `sidecar` as paths.
    """
    if kind not in ("auto", *CLIP_KINDS):
        raise ValueError(f"kind={kind!r}: accepted are auto, {', '.join(CLIP_KINDS)}")
    session = control.session_of(pipe)
    if save_focus and (session is None or session.ras is None):
        raise ValueError("save_focus: region-adaptive sampling is off; accepted with ras=...")
    if not fps > 0:
        raise ValueError(f"fps={fps}: accepted is a number > 0")
    folder = check_writable(output_dir, "output_dir")
    first = _free_index(folder)
    records = []
    for i, item in enumerate(prompts):
        own = {} if item.negative_prompt is None else {"negative_prompt": item.negative_prompt}
        used = Sampling(**{**asdict(sampling), **own})
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
