"""The same prompt and seed, dense and accelerated: clips, pictures, metrics and seconds."""

import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import control, media
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.environment import machine, versions
from dit_accel.eval.metrics.pairs import psnr, ssim
from dit_accel.files import check_writable, write_json
from dit_accel.pipelines.generate import FORMAT_VERSION, Sampling, run_once
from dit_accel.sla.files import Adapter

PICTURES = ("dense", "sparse", "side_by_side")
"""mp4 of a clip, png of an image."""
SHEET, RECORD = "contact_sheet.png", "comparison.json"


def compare(
    pipe: Any,
    prompt: str,
    *,
    sla: SLAConfig | Adapter | None = None,
    ras: RASConfig | None = None,
    output_dir: str | os.PathLike,
    model: str,
    sampling: Sampling,
    seed: int = 0,
    repeats: int = 1,
    fps: float = 16.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run dense and sparse from the same noise; write `PICTURES`, `SHEET` and `RECORD`.

    Dense and sparse runs alternate, after a short unmeasured warm-up each; the seconds are medians
    over `repeats`. PSNR and SSIM compare raw frames, before any video coding.

    Args:
        pipe: a loaded pipeline without acceleration (see `pipelines.generate.load`, `sla=None`).
        sla, ras: what the accelerated run uses; at least one of the two.
        output_dir: created if needed; existing results are an error unless `overwrite`.
        repeats: measured runs of each kind, >= 1.

    Returns:
        The comparison as written to comparison.json.
    """
    if sla is None and ras is None:
        raise ValueError(
            "sla=None, ras=None: nothing to compare; accepted is at least one of the two"
        )
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: accepted is an int >= 1")
    if not fps > 0:
        raise ValueError(f"fps={fps}: accepted is a number > 0")
    folder = check_writable(output_dir, "output_dir")
    names = [*(f"{x}.{kind}" for x in PICTURES for kind in ("mp4", "png")), SHEET, RECORD]
    present = [name for name in names if (folder / name).exists()]
    if present and not overwrite:
        raise ValueError(
            f"output_dir={str(output_dir)!r}: already holds {present[0]}; choose another or overwrite"
        )

    def run(
        accelerated: bool, how: Sampling
    ) -> tuple[np.ndarray, dict[str, float], control.Summary]:
        if accelerated:
            control.enable(pipe, sla=sla, ras=ras)
        try:
            return run_once(pipe, prompt, how, seed)
        finally:
            control.disable(pipe)

    # Region-adaptive sampling begins with dense steps.
    steps = 2 if ras is None else 8
    warm_up = sampling.filled({})
    warm_up = Sampling(**{**vars(warm_up), "num_inference_steps": steps})
    for accelerated in (False, True):
        run(accelerated, warm_up)
    seconds: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
    for _ in range(repeats):
        dense, took, _ = run(False, sampling)
        seconds["dense"].append(took)
        sparse, took, summary = run(True, sampling)
        seconds["sparse"].append(took)

    def median(kind: str, phase: str) -> float:
        return statistics.median(run[phase] for run in seconds[kind])

    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "prompt": prompt,
        "seed": seed,
        "model": model,
        "sampling": sampling.call_arguments(),
        "frames": list(dense.shape),
        "psnr_db": psnr(dense, sparse),
        "ssim": ssim(dense, sparse),
        "density": summary.density,
        "overall_density": summary.overall_density,
        "seconds": {
            kind: {phase: median(kind, phase) for phase in ("text", "denoise", "decode", "total")}
            for kind in seconds
        },
        "repeats": repeats,
        "speedup_denoise": median("dense", "denoise") / median("sparse", "denoise"),
        "speedup_total": median("dense", "total") / median("sparse", "total"),
        "acceleration": summary.to_dict(),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": str(pipe.transformer.device),
        "versions": versions(),
        "machine": machine(),
    }
    _write(folder, dense, sparse, result, fps)
    for name in set(present) - set(result["files"]):  # of a clip, where this is an image
        (folder / name).unlink()
    return {**result, "output_dir": str(folder)}


def _write(
    folder: Path, dense: np.ndarray, sparse: np.ndarray, result: dict[str, Any], fps: float
) -> None:
    a, b = media.to_uint8(dense), media.to_uint8(sparse)
    ras = result["acceleration"]["ras"]
    kept = "dense (below crossover)" if ras is None else "all keys"
    if result["density"] is not None:
        kept = f"sparse, density {result['density']:.2f}"
    if ras is not None:
        kept += f", {ras['cost']:.1f} of {len(ras['steps'])} steps"
    clips = [("dense", a), (kept, b)]
    difference = np.abs(a.astype(np.int16) - b).astype(np.uint8)
    kind = "png" if len(a) == 1 else "mp4"
    files = []
    for name, pictures in (
        ("dense", a),
        ("sparse", b),
        ("side_by_side", media.side_by_side(clips)),
    ):
        files += media.write_clip(folder / name, pictures, kind=kind, fps=fps)
    media.write_png(
        folder / SHEET, media.contact_sheet([*clips, ("absolute difference", difference)])
    )
    result["files"] = [*(path.name for path in files), SHEET, RECORD]
    # JSON knows no infinity; equal clips have no finite PSNR.
    if result["psnr_db"] == float("inf"):
        result["psnr_db"] = None
    write_json(folder / RECORD, result)
