"""What acceleration costs: sample sets, their metrics, methods compared at equal time, and one page.

The names here load at first use; none needs more than the core, except where its docstring says so.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.eval.metrics.features import Extractor as Extractor
    from dit_accel.eval.metrics.networks import Networks as Networks
    from dit_accel.eval.metrics.score import measure as measure
    from dit_accel.eval.metrics.score import score as score
    from dit_accel.eval.results.store import read_results as read_results
    from dit_accel.eval.runs.compare import compare as compare
    from dit_accel.eval.runs.run import run_evaluation as run_evaluation
    from dit_accel.eval.samples.generate import generate as generate
    from dit_accel.eval.samples.prompts import load_prompts as load_prompts
    from dit_accel.eval.samples.sets import SampleSet as SampleSet
    from dit_accel.eval.view.report import report as report

_HOMES = {
    "Extractor": "metrics.features",
    "Networks": "metrics.networks",
    "SampleSet": "samples.sets",
    "compare": "runs.compare",
    "generate": "samples.generate",
    "load_prompts": "samples.prompts",
    "measure": "metrics.score",
    "read_results": "results.store",
    "report": "view.report",
    "run_evaluation": "runs.run",
    "score": "metrics.score",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
