"""Rows of results.json from what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dit_accel.eval.results.types import PHASES, SPEEDUPS, MetricValue, Phase, Row
from dit_accel.eval.runs.methods import Method


def build_row(
    method: Method,
    *,
    steps: int,
    calls: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Phase] | None = None,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, MetricValue] | None = None,
    density: float | None = None,
    cost: float | None = None,
    folder: str | None = None,
) -> Row:
    """What a method made and took.

    Args:
        steps: of denoising.
        calls: records of measured calls (see `timing.Call.record`), at least one.
        reference: seconds of dense sampling; None for dense sampling itself.
        settings: what is shown of them; what ran dense under sparse attention is added.
        density, cost: of an accelerated run, as its summary counts them.
        folder: of the samples.
    """
    seconds = timing([x["seconds"] for x in calls])
    peaks = {x["peak_of"] for x in calls}
    of = peaks.pop() if len(peaks) == 1 else None
    shown = dict(settings or {})
    dense_calls = calls[-1]["dense_calls"]
    if dense_calls:
        shown["dense_calls"] = dense_calls
    if method.note is not None:
        shown["note"] = method.note
    plain = method.kind in ("dense", "fewer_steps")
    return {
        "name": method.name,
        "method": method.kind,
        "available": True,
        "why": None,
        "settings": shown,
        "num_inference_steps": steps,
        "metrics": dict(metrics or {}),
        "seconds": seconds,
        "speedup": speedup(seconds if reference is None else reference, seconds),
        "peak_memory_bytes": None if of is None else max(x["peak_bytes"] for x in calls),
        "peak_memory_of": of,
        "density": 1.0 if plain else density,
        "cost": float(steps) if plain else cost,
        "folder": folder,
    }


def mean_of(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Over the samples that have it."""
    values = [x[key] for x in records if x.get(key) is not None]
    return sum(values) / len(values) if values else None


def unavailable_row(
    name: str, method: str, why: str, *, num_inference_steps: int, **settings: Any
) -> Row:
    """A row that could not run, and the reason."""
    return {
        "name": name,
        "method": method,
        "available": False,
        "why": why,
        "settings": settings,
        "num_inference_steps": num_inference_steps,
        "metrics": {},
        "seconds": {},
        "speedup": None,
        "peak_memory_bytes": None,
        "peak_memory_of": None,
        "density": None,
        "cost": None,
        "folder": None,
    }


def timing(runs: Sequence[Mapping[str, float]]) -> dict[str, Phase]:
    """Median and quartiles of each of `PHASES` that all measured runs have; warm-up runs stay out.

    Args:
        runs: seconds by phase, one mapping a run, at least one.
    """
    if not runs:
        raise ValueError("runs=[]: accepted is at least one measured run")
    out: dict[str, Phase] = {}
    for phase in PHASES:
        if all(phase in run for run in runs):
            q1, median, q3 = np.percentile([run[phase] for run in runs], (25, 50, 75)).tolist()
            out[phase] = {"median": median, "iqr": [q1, q3], "n": len(runs)}
    return out


def speedup(reference: Mapping[str, Phase], row: Mapping[str, Phase]) -> dict[str, float] | None:
    """How often the row runs in the time of the reference, by medians; None if a phase is missing."""
    if any(phase not in reference or phase not in row for phase in SPEEDUPS):
        return None
    return {phase: reference[phase]["median"] / row[phase]["median"] for phase in SPEEDUPS}
