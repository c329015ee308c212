"""`run_batches`: the pipeline calls of a run, one after the other; everything that makes samples uses it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from dit_accel.runtime.install import installations_of
from dit_accel.sampling.call import BatchResult, run_batch
from dit_accel.sampling.plan import Sample

WARM_UP_STEPS = 2
"""Steps of a warm-up call without acceleration, where all steps are of one kind."""


def run_batches(
    pipe: Any, batches: Sequence[Sequence[Sample]], *, warm_up: bool = False
) -> Iterator[BatchResult]:
    """Make one batch after the other.

    Args:
        pipe: a loaded pipeline.
        batches: see `plan.plan_batches`.
        warm_up: make one call more before the first one, so that its seconds are like the others'.
    """
    if warm_up and batches:
        run_warm_up(pipe, batches[0])
    for batch in batches:
        yield run_batch(pipe, batch)


def run_warm_up(pipe: Any, batch: Sequence[Sample]) -> None:
    """Make a call that does not count: compiling a kernel, say, happens in the first call only."""
    # With acceleration a late step may be the first of its kind, so the call has all its steps.
    plain = not installations_of(pipe)
    run_batch(pipe, batch, **({"num_inference_steps": WARM_UP_STEPS} if plain else {}))


def progress_bar(**options: Any) -> Any:
    """Return a tqdm bar of samples on stderr."""
    from tqdm import tqdm

    return tqdm(**{"unit": "sample"} | options)


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Switch the pipeline's own progress bar off, which would be one a batch."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
