"""`compare`: an evaluation of one prompt, dense and accelerated, with clips and pictures to look at."""

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
from dit_accel.eval.metrics.pairs import psnr, ssim
from dit_accel.eval.metrics.values import mean_value
from dit_accel.eval.results.store import build_results
from dit_accel.eval.results.types import PHASES, MetricValue, Results, Row
from dit_accel.eval.runs.lineup import line_up
from dit_accel.eval.runs.measured import MeasuredCalls
from dit_accel.eval.runs.methods import DENSE, Crossover, Method
from dit_accel.eval.runs.rivals import choose_settings
from dit_accel.files import atomic_files, check_writable, naming_failures, write_json
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling import media
from dit_accel.sampling.call import BatchResult
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import number_prompts
from dit_accel.sampling.settings import Sampling, check_count, check_fps, with_steps

FORMAT_VERSION = 1
SHEET, RECORD = "contact_sheet.png", "comparison.json"
COMPARED = ("psnr", "ssim")
"""Metrics of a comparison."""
_NAMES = {"sla": "SLA", "ras": "RAS", "ras_sla": "RAS + SLA"}


def compare(
    pipe: Any,
    prompt: str,
    *,
    sla: SLAConfig | SLACheckpoint | dict | None = None,
    ras: RASConfig | None = None,
    methods: Sequence[str | Method] = (),
    crossover: Crossover | None = None,
    output_dir: str | os.PathLike,
    model: str,
    sampling: Sampling,
    seed: int = 0,
    repeats: int = 1,
    fps: float | int = 16.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run dense and sparse from the same noise; write a clip (mp4) or image (png) of each, both
    `side_by_side`, `SHEET` and `RECORD`.

    The runs alternate, after a short unmeasured warm-up each; the seconds are medians over `repeats`. PSNR
    and SSIM compare raw frames, before any video coding.

    Args:
        pipe: a loaded pipeline without acceleration (see `load.load_pipeline`, `sla=None`).
        sla, ras: settings of the accelerated run; at least one of the two.
        methods: further methods to run, as in `methods.read_methods`: "fewer_steps" is dense sampling with the
            number of steps whose denoising takes the time of an accelerated run, what it has to beat.
        crossover: overrides that of sparse attention in `methods`.
        output_dir: created if needed; existing results are an error unless `overwrite`.
        repeats: measured runs of each kind, >= 1.

    Returns:
        The comparison as written to comparison.json. Its `rows` are those of an evaluation's results.json,
        the accelerated run last.

    Raises:
        ValueError: bad input, before any work.
        RuntimeError: a file could not be written; then the folder is as it was.
    """
    if sla is None and ras is None:
        raise ValueError(
            "sla=None, ras=None: nothing to compare; accepted is at least one of the two"
        )
    check_count("repeats", repeats)
    check_fps(fps)
    sampling = with_steps(pipe, sampling)
    samples = plan_samples(number_prompts([prompt]), sampling, seed=seed, count=1, layout="ids")
    pipe.check_sizes(**sampling.call_arguments())
    assert sampling.num_inference_steps is not None
    kind = "sla" if ras is None else "ras" if sla is None else "ras_sla"
    sparse = Method(name=_NAMES[kind], kind=kind, sla=sla, ras=ras)
    lineup = line_up(
        [*methods, sparse], pipe, steps=sampling.num_inference_steps, crossover=crossover
    )
    folder = check_writable(output_dir, "output_dir")
    earlier = _earlier(folder, overwrite)
    lineup = choose_settings(lineup, pipe, samples, count=1)  # as many samples as are compared
    last: dict[str, BatchResult] = {}
    measured = MeasuredCalls(pipe, samples, lineup)
    measured.measure(repeats, on_call=lambda method, call: last.update({method.name: call.made}))
    shown = lineup.rows(measured.fewer)
    calls = {x.name: last[x.name] for x in shown if x.why is None}
    rows = [_row(x, measured, calls) for x in shown]
    result = _record(rows, calls[sparse.name]) | {
        "prompt": prompt,
        "seed": seed,
        "model": model,
        "sampling": sampling.call_arguments(),
        "frames": list(calls[sparse.name].frames[0].shape),
        "repeats": repeats,
        "dtype": str(transformers_of(pipe)[0].dtype).removeprefix("torch."),
        "device": str(transformers_of(pipe)[0].device),
        "versions": versions(),
        "machine": machine(),
    }
    pictures = {name: call.pictures(0) for name, call in calls.items()}
    stems = {x.name: x.folder for x in shown} | {sparse.name: "sparse"}
    with naming_failures("nothing of this comparison is kept"), atomic_files(folder) as staging:
        files = _write(staging, pictures, stems, result, fps)
        result["files"] = [*files, SHEET, RECORD]
        write_json(staging / RECORD, result)
    for name in earlier - set(result["files"]):
        (folder / name).unlink(missing_ok=True)
    return {**result, "output_dir": str(folder)}


def _earlier(folder: Path, overwrite: bool) -> set[str]:
    """Return the files of an earlier comparison, which go when the new one is written.

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
    """Return the comparison in the form of an evaluation, for its table and conditions."""
    return build_results(
        title="comparison",
        model=comparison["model"],
        sampling=comparison["sampling"],
        prompts=1,
        repeats=comparison["repeats"],
        rows=comparison["rows"],
        samples=[],
    )


def _row(method: Method, measured: MeasuredCalls, calls: Mapping[str, BatchResult]) -> Row:
    """Return the row of a method, with PSNR and SSIM of raw frames against dense sampling."""
    if method.why is not None:
        return measured.missing_row(method)
    call, dense = calls[method.name], calls[DENSE.name].frames[0]
    metrics: dict[str, MetricValue] = {}
    if method.name != DENSE.name:
        metrics["psnr"] = mean_value([psnr(dense, call.frames[0])], "dB")
        metrics["ssim"] = mean_value([ssim(dense, call.frames[0])], "")
    row = measured.row(
        method,
        metrics=metrics,
        density=call.summary.overall_density,
        cost=None if call.summary.ras is None else call.summary.ras.cost,
    )
    if row["peak_memory_of"] == "process":  # which also holds the frames of the other runs
        row |= {"peak_memory_bytes": None, "peak_memory_of": None}
    return row


def _record(rows: Sequence[Row], sparse: BatchResult) -> dict[str, Any]:
    """Return the figures by name, and all rows."""
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
    shown: Mapping[str, np.ndarray],
    stems: Mapping[str, str],
    result: dict[str, Any],
    fps: float | int,
) -> list[str]:
    """Write the pictures of each method, the accelerated one last; return their names."""
    ras, parts = result["acceleration"]["ras"], []
    if result["density"] is not None:
        parts.append(f"sparse, density {result['density']:.2f}")
    if ras is not None:
        parts.append(f"ras, cost of {ras['cost']:.1f} of {len(ras['steps'])} steps")
    kept = ", ".join(parts) or "dense (below crossover)"
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
