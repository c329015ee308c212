"""Rows of results.json from measured calls and metrics."""

from collections.abc import Mapping, Sequence

import numpy as np

from dit_accel.eval.results.types import PHASES, SPEEDUPS, MetricValue, Phase, Row
from dit_accel.eval.runs.methods import DENSE, Method
from dit_accel.eval.runs.timing import MeasuredCalls


def build_row(
    method: Method,
    measured: MeasuredCalls,
    *,
    metrics: Mapping[str, MetricValue] | None = None,
    density: float | None = None,
    cost: float | None = None,
    folder: str | None = None,
) -> Row:
    """Return the row of a method; without values if it cannot run here.

    `density` and `cost` (in dense steps) are those of the summary of an accelerated run.
    """
    calls, dense = (measured.calls.get(x, []) for x in (method.name, DENSE.name))
    shown, seconds = dict(method.settings), timing([x["seconds"] for x in calls])
    if calls and calls[-1]["dense_calls"]:
        shown["dense_calls"] = calls[-1]["dense_calls"]
    steps = method.num_inference_steps or measured.steps
    if method.cost is not None:
        cost = method.cost * measured.steps
    if calls and method.kind in ("dense", "fewer_steps"):
        density, cost = 1.0, float(steps)
    sources = {x["peak_of"] for x in calls}
    of = sources.pop() if len(sources) == 1 else None
    return {
        "name": method.name,
        "method": method.kind,
        "available": method.why is None,
        "why": method.why,
        "settings": shown,
        "num_inference_steps": steps,
        "metrics": dict(metrics or {}),
        "seconds": seconds,
        "speedup": speedup(timing([x["seconds"] for x in dense]), seconds),
        "peak_memory_bytes": None if of is None else max(x["peak_bytes"] for x in calls),
        "peak_memory_of": of,
        "density": density,
        "cost": cost,
        "folder": folder,
    }


def timing(runs: Sequence[Mapping[str, float]]) -> dict[str, Phase]:
    """Return median and quartiles of each phase that all runs have."""
    out: dict[str, Phase] = {}
    for phase in PHASES:
        if runs and all(phase in run for run in runs):
            q1, median, q3 = np.percentile([run[phase] for run in runs], (25, 50, 75)).tolist()
            out[phase] = {"median": median, "iqr": [q1, q3], "n": len(runs)}
    return out


def speedup(reference: Mapping[str, Phase], row: Mapping[str, Phase]) -> dict[str, float] | None:
    """Return the ratios of the median seconds; None if a phase is missing."""
    if any(phase not in reference or phase not in row for phase in SPEEDUPS):
        return None
    return {phase: reference[phase]["median"] / row[phase]["median"] for phase in SPEEDUPS}
