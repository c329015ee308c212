"""The same prompt and seed, dense and accelerated: clips, pictures, metrics and seconds."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.environment import machine, versions
from dit_accel.eval.metrics.figures import mean_figure
from dit_accel.eval.metrics.pairs import psnr, ssim
from dit_accel.eval.results.store import build_results
from dit_accel.eval.results.types import PHASES, Figure, Results, Row
from dit_accel.eval.runs.fewer_steps import measure_all
from dit_accel.eval.runs.methods import DENSE, Crossover, Method, check_methods, read_methods
from dit_accel.eval.runs.rows import build_row, unavailable_row
from dit_accel.eval.runs.timing import Call, Request, Stopwatch
from dit_accel.files import check_writable, write_json
from dit_accel.sampling import media
from dit_accel.sampling.pipeline_call import FORMAT_VERSION, Sampling, with_steps

SHEET, RECORD = "contact_sheet.png", "comparison.json"
COMPARED = ("psnr", "ssim")
"""Metrics of a comparison."""
_NAMES = {"sla": "SLA", "ras": "RAS", "ras_sla": "RAS + SLA"}


def compare(
    pipe: Any,
    prompt: str,
    *,
    sla: SLAConfig | SLACheckpoint | None = None,
    ras: RASConfig | None = None,
    methods: Sequence[str | Method] = (),
    crossover: Crossover | None = None,
    output_dir: str | os.PathLike,
    model: str,
    sampling: Sampling,
    seed: int = 0,
    repeats: int = 1,
    fps: float = 16.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run dense and sparse from the same noise; write a clip (mp4) or image (png) of each, both
    `side_by_side`, `SHEET` and `RECORD`.

    The runs alternate, after a short unmeasured warm-up each; the seconds are medians over `repeats`. PSNR
    and SSIM compare raw frames, before any video coding.

    Args:
        pipe: a loaded pipeline without acceleration (see `pipelines.generate.load`, `sla=None`).
        sla, ras: what the accelerated run uses; at least one of the two.
        methods: what else to run, as in `methods.read_methods`: "fewer_steps" is dense sampling with the
            number of steps whose denoising takes the time of an accelerated run, what it has to beat.
        crossover: of sparse attention in `methods`.
        output_dir: created if needed; existing results are an error unless `overwrite`.
        repeats: measured runs of each kind, >= 1.

    Returns:
        The comparison as written to comparison.json. Its `rows` are those of an evaluation's results.json,
        the accelerated run last.
    """
    if sla is None and ras is None:
        raise ValueError(
            "sla=None, ras=None: nothing to compare; accepted is at least one of the two"
        )
    if not prompt.strip():
        raise ValueError("prompt='': accepted is a text that is not empty")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: accepted is an int >= 1")
    if not fps > 0:
        raise ValueError(f"fps={fps}: accepted is a number > 0")
    sampling = with_steps(pipe, sampling)
    steps = sampling.num_inference_steps
    assert steps is not None
    folder = check_writable(output_dir, "output_dir")
    kind = "sla" if ras is None else "ras" if sla is None else "ras_sla"
    sparse = Method(name=_NAMES[kind], kind=kind, sla=sla, ras=ras)
    chosen = read_methods([*methods, sparse], pipe, crossover=crossover)
    runnable = [x for x in chosen if x.why is None]
    settings = check_methods(pipe, runnable, steps)
    earlier = _earlier(folder, overwrite)
    last: dict[str, Call] = {}

    def keep(method: Method, call: Call) -> None:
        last[method.name] = call

    watch = Stopwatch(pipe, [Request(prompt, sampling, seed)], on_call=keep)
    fewer = [x for x in runnable if x.kind == "fewer_steps"]
    others = [x for x in runnable if x.kind != "fewer_steps"]
    fewer, _ = measure_all(watch, others, fewer, repeats, steps=steps)
    rest = [x for x in chosen if x.kind not in ("dense", "fewer_steps")]
    shown = [DENSE, *fewer, *rest]
    calls = {x.name: last[x.name] for x in shown if x.why is None}
    rows = _rows(shown, watch, calls, settings, steps)
    result = _record(rows, calls[sparse.name]) | {
        "prompt": prompt,
        "seed": seed,
        "model": model,
        "sampling": sampling.call_arguments(),
        "frames": list(calls[sparse.name].frames.shape),
        "repeats": repeats,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": str(pipe.transformer.device),
        "versions": versions(),
        "machine": machine(),
    }
    frames = {x.name: calls[x.name].frames for x in shown if x.name in calls}
    stems = {x.name: x.folder for x in shown} | {sparse.name: "sparse"}
    files = _write(folder, frames, stems, result, fps)
    result["files"] = [*files, SHEET, RECORD]
    write_json(folder / RECORD, result)
    for name in earlier - set(result["files"]):
        (folder / name).unlink(missing_ok=True)
    return {**result, "output_dir": str(folder)}


def _earlier(folder: Path, overwrite: bool) -> set[str]:
    """Files of an earlier comparison, which go when the new one is written.

    Raises:
        ValueError: there is one, and it must stay.
    """
    pictures = [
        f"{x}.{kind}" for x in ("dense", "sparse", "side_by_side") for kind in ("mp4", "png")
    ]
    present = {name for name in (*pictures, SHEET, RECORD) if (folder / name).exists()}
    if present and not overwrite:
        raise ValueError(
            f"output_dir={str(folder)!r}: already holds {min(present)}; choose another or overwrite"
        )
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        present |= {x for x in files if Path(x).name == x and (folder / x).is_file()}
    return present


def as_results(comparison: Mapping[str, Any]) -> Results:
    """The comparison in the form of an evaluation, for its table and conditions."""
    return build_results(
        title="comparison",
        model=comparison["model"],
        sampling=comparison["sampling"],
        prompts=1,
        repeats=comparison["repeats"],
        rows=comparison["rows"],
        samples=[],
    )


def _rows(
    methods: Sequence[Method],
    watch: Stopwatch,
    calls: Mapping[str, Call],
    settings: Mapping[str, Any],
    steps: int,
) -> list[Row]:
    rows: list[Row] = []
    dense = calls[DENSE.name].frames
    for method in methods:
        n = method.num_inference_steps or steps
        if method.why is not None:
            rows.append(
                unavailable_row(method.name, method.kind, method.why, num_inference_steps=n)
            )
            continue
        call = calls[method.name]
        metrics: dict[str, Figure] = {}
        if rows:
            metrics["psnr"] = mean_figure([psnr(dense, call.frames)], "dB")
            metrics["ssim"] = mean_figure([ssim(dense, call.frames)], "")
        row = build_row(
            method,
            steps=n,
            calls=watch.calls[method.name],
            reference=rows[0]["seconds"] if rows else None,
            settings=settings.get(method.name),
            metrics=metrics,
            density=call.summary.overall_density,
            cost=None if call.summary.ras is None else call.summary.ras.cost,
        )
        if row["peak_memory_of"] == "process":  # which also holds the frames of the other runs
            row |= {"peak_memory_bytes": None, "peak_memory_of": None}
        rows.append(row)
    return rows


def _record(rows: Sequence[Row], sparse: Call) -> dict[str, Any]:
    """The figures by name, and all rows."""
    last = rows[-1]
    assert last["speedup"] is not None
    return {
        "format_version": FORMAT_VERSION,
        "psnr_db": last["metrics"]["psnr"]["value"],  # None for equal clips
        "ssim": last["metrics"]["ssim"]["value"],
        "density": sparse.summary.density,
        "overall_density": sparse.summary.overall_density,
        "seconds": {
            key: {phase: row["seconds"][phase]["median"] for phase in PHASES}
            for key, row in (("dense", rows[0]), ("sparse", last))
        },
        "speedup_denoise": last["speedup"]["denoise"],
        "speedup_total": last["speedup"]["total"],
        "acceleration": sparse.summary.to_dict(),
        "rows": rows,
    }


def _write(
    folder: Path,
    frames: Mapping[str, np.ndarray],
    stems: Mapping[str, str],
    result: dict[str, Any],
    fps: float,
) -> list[str]:
    """The pictures of each method, the accelerated one last; their names."""
    ras = result["acceleration"]["ras"]
    kept = "dense (below crossover)" if ras is None else "all keys"
    if result["density"] is not None:
        kept = f"sparse, density {result['density']:.2f}"
    if ras is not None:
        kept += f", {ras['cost']:.1f} of {len(ras['steps'])} steps"
    shown = {name: media.to_uint8(x) for name, x in frames.items()}
    *others, last = shown
    clips = [*((x.lower(), shown[x]) for x in others), (kept, shown[last])]
    difference = np.abs(clips[0][1].astype(np.int16) - shown[last]).astype(np.uint8)
    kind = "png" if len(difference) == 1 else "mp4"
    written = []
    for stem, pictures in (
        *((stems[name], x) for name, x in shown.items()),
        ("side_by_side", media.side_by_side(clips)),
    ):
        written += media.write_clip(folder / stem, pictures, kind=kind, fps=fps)
    media.write_png(
        folder / SHEET, media.contact_sheet([*clips, ("absolute difference", difference)])
    )
    return [path.name for path in written]
