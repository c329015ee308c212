"""`compare`: an evaluation of one prompt without sample sets, with clips beside each other."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import public_name
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.metrics import pairs
from dit_accel.eval.metrics.values import mean_value
from dit_accel.eval.results.store import build_results, read_results, write_results
from dit_accel.eval.results.types import RESULTS, Results, Row
from dit_accel.eval.runs.methods import DENSE, Crossover, Method, read_methods
from dit_accel.eval.runs.rivals import choose_settings
from dit_accel.eval.runs.rows import build_row
from dit_accel.eval.runs.timing import MeasuredCalls
from dit_accel.files import atomic_files, check_writable, naming_failures
from dit_accel.sampling import media, settings
from dit_accel.sampling.call import BatchResult
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import number_prompts

SHEET = "contact_sheet.png"
COLUMNS, BRIGHTER = 4, 8
"""Frames of each method in the contact sheet, and the factor of their differences."""
COMPARED = ("psnr", "ssim")
"""Metrics of a comparison."""


def compared_methods(
    names: Sequence[str], pipe: Any, *, steps: int, sla: Any, ras: Any, crossover: Crossover | None
) -> list[Method]:
    """Return dense sampling, the methods of these names, and last the accelerated run of a comparison.

    Raises:
        ValueError: no acceleration, or a bad method.
    """
    kinds = [name for name, x in (("ras", ras), ("sla", sla)) if x is not None]
    if not kinds:
        raise ValueError("sla=None, ras=None: needs at least one of the two")
    name = " + ".join(kinds).upper()
    accelerated = Method(name=name, kind="_".join(kinds), sla=sla, ras=ras)
    return [*read_methods(names, pipe, steps=steps, crossover=crossover), accelerated]


def compare(
    pipe: Any,
    prompt: str,
    *,
    sla: SLAConfig | SLACheckpoint | dict | None = None,
    ras: RASConfig | None = None,
    methods: Sequence[str] = (),
    crossover: Crossover | None = None,
    output_dir: str | os.PathLike,
    model: str,
    sampling: settings.Sampling,
    seed: int = 0,
    repeats: int = 1,
    fps: float | int = 16.0,
    overwrite: bool = False,
) -> Results:
    """Run dense and accelerated sampling from the same noise; write a clip or image of each, and results.json.

    The files are `dense.mp4`, `sparse.mp4` (the accelerated run), one for each further method, `side_by_side.mp4` (png
    for images) and contact_sheet.png. Methods take turns, after an unmeasured warm-up each; seconds are medians. PSNR and
    SSIM compare raw frames, before video coding.

    Args:
        pipe: a loaded pipeline without acceleration.
        prompt: the prompt.
        sla, ras: settings of the accelerated run; at least one of the two.
        methods: names of further methods, see `methods.read_methods`.
        crossover: replaces the crossover of sparse attention in `methods`.
        output_dir: folder of the files, created if needed.
        model: name of the model for the records.
        sampling: arguments of the pipeline calls.
        seed: seed of the noise.
        repeats: measured calls of each method, >= 1.
        fps: frame rate of the clips.
        overwrite: replace an earlier comparison. Without it, an earlier one is an error.

    Returns:
        The results as in results.json. The last row is the accelerated run.

    Raises:
        ValueError: bad input, before any work.
        RuntimeError: a file could not be written; the folder is then as it was.
    """
    settings.check_count("repeats", repeats)
    settings.check_fps(fps)
    sampling = settings.with_steps(pipe, sampling)
    samples = plan_samples(number_prompts([prompt]), sampling, seed=seed, count=1, layout="ids")
    pipe.check_sizes(**sampling.call_arguments())
    steps = sampling.num_inference_steps
    assert steps is not None
    given = compared_methods(methods, pipe, steps=steps, sla=sla, ras=ras, crossover=crossover)
    tried = [x.tried(pipe, steps) for x in given]
    folder = check_writable(output_dir, "output_dir")
    names = [f"{x}.{kind}" for x in ("dense", "sparse", "side_by_side") for kind in ("mp4", "png")]
    earlier = {name for name in (*names, SHEET, RESULTS) if (folder / name).exists()}
    if earlier and not overwrite:
        raise ValueError(
            f"output_dir={str(folder)!r}: already holds {min(earlier)}; choose another or overwrite"
        )
    with contextlib.suppress(ValueError):
        files = [x for sample in read_results(folder)["samples"] for x in sample["media"].values()]
        earlier |= {x for x in files if "/" not in x}
    chosen = choose_settings(tried, pipe, samples, count=1)  # as many samples as are compared
    last: dict[str, BatchResult] = {}
    calls = MeasuredCalls(pipe, samples, steps)
    calls.on_call = lambda method, made: last.update({method.name: made})
    fewer = calls.measure(chosen, repeats)
    shown = [DENSE, *fewer, *(x for x in chosen if x.kind not in ("dense", "fewer_steps"))]
    stems = {x.name: x.folder for x in shown if x.why is None} | {shown[-1].name: "sparse"}
    with naming_failures("nothing of this comparison is kept"), atomic_files(folder) as staging:
        rows = [_row(x, calls, last) for x in shown]
        written = _write(staging, stems, last, fps)
        media.write_png(staging / SHEET, _sheet(rows, last))
        results = build_results(
            title="comparison",
            model=public_name(model),
            sampling=sampling.call_arguments() | {"seed": seed},
            prompts=1,
            repeats=repeats,
            rows=rows,
            samples=[{"id": samples[0].id, "prompt": prompt, "media": written}],
        )
        write_results(staging, results)
        earlier -= {path.name for path in staging.iterdir()}
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
    return results


def _row(method: Method, calls: MeasuredCalls, last: dict[str, BatchResult]) -> Row:
    """Return the row of a method, with metrics of raw frames against dense sampling."""
    if method.why is not None:
        return build_row(method, calls)
    made, dense = last[method.name], last[DENSE.name].frames[0]
    metrics = {}
    if method.name != DENSE.name:
        metrics["psnr"] = mean_value([pairs.psnr(dense, made.frames[0])], "dB")
        metrics["ssim"] = mean_value([pairs.ssim(dense, made.frames[0])], "")
    cost = None if made.summary.ras is None else made.summary.ras.cost
    density = made.summary.overall_density
    row = build_row(method, calls, metrics=metrics, density=density, cost=cost)
    if row["peak_memory_of"] == "process":  # it also holds the frames of the other runs
        row |= {"peak_memory_bytes": None, "peak_memory_of": None}
    return row


def _write(
    folder: Path, stems: dict[str, str], last: dict[str, BatchResult], fps: float | int
) -> dict[str, str]:
    """Write the pictures of each method, the accelerated run last; return the files by method."""
    clips = [(name, last[name].pictures(0)) for name in stems]
    kind = "png" if len(clips[0][1]) == 1 else "mp4"
    written = {}
    for name, pictures in clips:
        [path] = media.write_clip(folder / stems[name], pictures, kind=kind, fps=fps)
        written[name] = path.name
    media.write_clip(folder / "side_by_side", media.side_by_side(clips), kind=kind, fps=fps)
    return written


def _sheet(rows: Sequence[Row], last: dict[str, BatchResult]) -> np.ndarray:
    """Return a picture with a row for each method: some frames, then their differences to dense sampling, brightened."""
    dense = last[DENSE.name].pictures(0)
    chosen = np.linspace(0, len(dense) - 1, min(len(dense), COLUMNS)).round().astype(int)
    strips = []
    for row in rows:
        if row["name"] not in last:
            continue
        pictures = last[row["name"]].pictures(0)[chosen]
        difference = np.abs(dense[chosen].astype(np.int16) - pictures) * BRIGHTER
        title, psnr = row["name"], row["metrics"].get("psnr")
        if psnr is not None and psnr["value"] is not None:
            title += f": {psnr['value']:.1f} dB to {DENSE.name.lower()} (right: difference, {BRIGHTER} times brighter)"
        strips.append((title, np.concatenate([pictures, difference.clip(0, 255).astype(np.uint8)])))
    return media.contact_sheet(strips, columns=2 * len(chosen))
