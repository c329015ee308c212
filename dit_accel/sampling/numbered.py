"""Generation of numbered files with sidecar JSON files, as `dit-accel generate` does."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.environment import machine, versions
from dit_accel.files import check_writable, naming_failures, write_json
from dit_accel.runtime.components import transformers_of
from dit_accel.runtime.install import method_of
from dit_accel.sampling import media
from dit_accel.sampling.batches import run_batches
from dit_accel.sampling.call import BatchResult, run_latents
from dit_accel.sampling.claims import claimed_stem
from dit_accel.sampling.focus import focus_masks, write_focus
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.settings import Sampling, check_fps

FORMAT_VERSION = 1
CLIP_KINDS = ("mp4", "gif", "png")


def generate_numbered(
    pipe: Any,
    prompts: Sequence[PromptRecord],
    *,
    output_dir: str | os.PathLike,
    model: str,
    sampling: Sampling,
    seed: int = 0,
    kind: str = "auto",
    fps: float | int = 16.0,
    save_focus: bool = False,
    extras: dict[str, Any] | None = None,
    writes: bool = True,
) -> list[dict[str, Any]]:
    """Generate one clip or image per prompt, with a numbered file and a sidecar JSON for each.

    Several processes may write into one folder. Each number is used by one of them.

    Args:
        pipe: a loaded pipeline (see `load.load_pipeline`).
        prompts: prompt records (see `prompts.read_prompts`). Their sizes and negative prompts override `sampling`.
        output_dir: folder for the files, created if needed. Numbers continue after the existing ones.
        model: name of the model in the sidecars.
        sampling: arguments of the pipeline calls.
        seed: seed of the first sample. Sample i has `seed + i`, unless its prompt has its own seed.
        kind: "mp4", "gif" or "png" (frames). "auto" is png for images and mp4 for clips.
        fps: frame rate of the clips.
        save_focus: also write images of the tokens that region-adaptive sampling ran, see `write_focus`.
        extras: further entries of the sidecars (see `extras.prepare`).
        writes: False for a process that computes the samples together with another process, which writes the files.

    Returns:
        The content of each sidecar, with "files" as paths and "sidecar", the path of the sidecar.

    Raises:
        ValueError: an argument is invalid; nothing is generated.
        RuntimeError: a file could not be written. Finished samples are kept.
    """
    if kind not in ("auto", *CLIP_KINDS):
        raise ValueError(f"kind={kind!r}: must be one of auto, {', '.join(CLIP_KINDS)}")
    found = [method_of(x, "ras") for x in transformers_of(pipe)]
    on_some = [x for x in found if x is not None]
    if save_focus and not any(x.config.has_partial_steps for x in on_some):
        on = "on, but without partial steps" if on_some else "off"
        raise ValueError(
            f"save_focus=True: region-adaptive sampling is {on}; needs ras settings with a ratio, such as 'partial'"
        )
    check_fps(fps)
    samples = plan_samples(prompts, sampling, seed=seed, count=1, layout="ids")
    for sample in samples:
        pipe.check_sizes(**sample.sampling.call_arguments())
    if not writes:
        for sample in samples:
            run_latents(pipe, [sample])
        return []
    folder = check_writable(output_dir, "output_dir")
    records = []
    for made in run_batches(pipe, [[x] for x in samples]):
        about = {"model": model, "fps": fps, "extras": extras or {}}
        masks = focus_masks(pipe) if save_focus else {}
        records.append(_write(folder, made, _record(pipe, made, about), kind=kind, masks=masks))
    return records


def _record(pipe: Any, made: BatchResult, about: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the sidecar without the file names."""
    [sample], [frames] = made.samples, made.frames
    return {
        "format_version": FORMAT_VERSION,
        "prompt": sample.record.prompt,
        "seed": sample.seed,
        "model": about["model"],
        "sampling": sample.sampling.call_arguments(),
        **about["extras"],
        "frames": list(frames.shape),
        "fps": about["fps"],
        "dtype": str(transformers_of(pipe)[0].dtype).removeprefix("torch."),
        "device": str(transformers_of(pipe)[0].device),
        "seconds": made.seconds,
        "acceleration": made.summary.to_dict(),
        "versions": versions(),
        "machine": machine(),
    }


def _write(
    folder: Path, made: BatchResult, record: dict[str, Any], *, kind: str, masks: dict[int, Any]
) -> dict[str, Any]:
    """Write the files of one sample, with the sidecar last, and return its record with paths."""
    pictures = made.pictures(0)
    if kind == "auto":
        kind = "png" if len(pictures) == 1 else "mp4"
    with naming_failures("finished samples are kept"), claimed_stem(folder) as stem:
        files = media.write_clip(stem, pictures, kind=kind, fps=record["fps"])
        if masks:
            files += write_focus(stem, pictures, masks, fps=record["fps"])
        record["files"] = [path.name for path in files]
        sidecar = stem.with_suffix(".json")
        write_json(sidecar, record)
    return {**record, "files": [str(path) for path in files], "sidecar": str(sidecar)}
