"""Evaluation of acceleration: sample sets, their metrics, methods compared at equal time, and one page.

The names here load at first use; none needs more than the core, except where its docstring says so.
"""

from typing import TYPE_CHECKING

from dit_accel.lazy import lazy_names

if TYPE_CHECKING:
    from dit_accel.eval.metrics.features import Extractor as Extractor
    from dit_accel.eval.metrics.networks import Networks as Networks
    from dit_accel.eval.metrics.score import measure as measure
    from dit_accel.eval.metrics.score import score as score
    from dit_accel.eval.results.store import read_results as read_results
    from dit_accel.eval.runs.compare import compare as compare
    from dit_accel.eval.runs.run import run_evaluation as run_evaluation
    from dit_accel.eval.view.report import report as report
    from dit_accel.sampling.generate import generate as generate
    from dit_accel.sampling.prompt_sets import load_prompts as load_prompts
    from dit_accel.sampling.sets import SampleSet as SampleSet

_HOMES = {
    "Extractor": "dit_accel.eval.metrics.features",
    "Networks": "dit_accel.eval.metrics.networks",
    "SampleSet": "dit_accel.sampling.sets",
    "compare": "dit_accel.eval.runs.compare",
    "generate": "dit_accel.sampling.generate",
    "load_prompts": "dit_accel.sampling.prompt_sets",
    "measure": "dit_accel.eval.metrics.score",
    "read_results": "dit_accel.eval.results.store",
    "report": "dit_accel.eval.view.report",
    "run_evaluation": "dit_accel.eval.runs.run",
    "score": "dit_accel.eval.metrics.score",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
