"""Evaluations that need no arguments: the demo on the embedded models."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.results.types import Results
from dit_accel.eval.runs.caches import CACHES
from dit_accel.eval.runs.methods import Method
from dit_accel.eval.runs.run import check_fine, run_evaluation
from dit_accel.files import asset
from dit_accel.sampling.load import load_pipeline
from dit_accel.sampling.outline import read_outline
from dit_accel.sampling.prompt_sets import load_prompts
from dit_accel.sampling.settings import Sampling

REPEATS = 5


@dataclass(frozen=True)
class Preset:
    """What is run with one model."""

    prompts: str
    """A shipped set."""
    limit: int
    """Prompts of it."""
    steps: tuple[int, ...]
    """Numbers of dense steps beside those at equal time, so that there is a line to beat."""


# So few tokens are below the crossover: sparse attention costs time here, and only its quality tells.
_SHORT = SLAConfig(block_q=16, block_k=16, crossover="never")
_NOTE = (
    "crossover='never': so short a sequence is below the length from which sparse attention pays off, "
    "where crossover='auto' would run dense"
)
_SPARSE = (
    "ras",
    Method(name="SLA, blocks of 16", kind="sla", sla=_SHORT, note=_NOTE),
    Method(
        name="RAS + SLA, blocks of 16",
        kind="ras_sla",
        ras=RASConfig.load("balanced"),
        sla=_SHORT,
        note=_NOTE,
    ),
)
_METHODS: tuple[str | Method, ...] = (*CACHES, *_SPARSE)
DEMO = {
    "tiny-wan": Preset("demo", 6, (9, 6)),
    "tiny-sd3": Preset("demo-images", 8, (15, 10)),
    "tiny-lumina2": Preset("demo-images", 8, (15, 10)),
}
"""By embedded model."""


def run_demo(
    output_dir: str | os.PathLike,
    *,
    models: Sequence[str] = tuple(DEMO),
    limit: int | None = None,
    repeats: int = REPEATS,
    num_inference_steps: int | None = None,
    fine_steps: int | None = 100,
    device: str = "auto",
    **options: Any,
) -> dict[str, Results]:
    """Evaluate the embedded models, each in a sub-folder of its own with a page of its own.

    Args:
        models: of `DEMO`.
        limit: prompts of each; None: as many as take some minutes on two cores.
        num_inference_steps: None: what the models were made for.
        fine_steps: steps of the fine run, see `run_evaluation`.
        options: further arguments of `run_evaluation`.
    """
    from dit_accel.demo import default_sampling

    own = Sampling(num_inference_steps=num_inference_steps)
    samplings = {x: own.filled(default_sampling(read_outline(asset(x)))) for x in models}
    steps = {x: y.num_inference_steps or 0 for x, y in samplings.items()}
    if fine_steps is not None:
        check_fine(fine_steps, max(steps.values()))
    results = {}
    for name, sampling in samplings.items():
        preset = DEMO[name]
        dense = [f"fewer_steps:{n}" for n in preset.steps if n < steps[name]]
        prompts = load_prompts(preset.prompts)
        compared = load_prompts(preset.prompts, preset.limit if limit is None else limit)
        results[name] = run_evaluation(
            load_pipeline(asset(name), sla=None, device=device),
            compared,
            output_dir=Path(output_dir) / name,
            model=name,
            sampling=sampling,
            methods=("fewer_steps", *dense, *_METHODS),
            repeats=repeats,
            fine_steps=fine_steps,
            probes=prompts[len(compared) :],
            **options,
        )
    return results
