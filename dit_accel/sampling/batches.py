"""Pipeline calls of a run, one batch after the other, with warm-up and progress bars."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from dit_accel.runtime.install import installations_of
from dit_accel.sampling.call import BatchResult, run_batch
from dit_accel.sampling.plan import Sample

WARM_UP_STEPS = 2
"""Number of steps of a warm-up call without acceleration."""


def run_batches(
    pipe: Any, batches: Sequence[Sequence[Sample]], *, warm_up: bool = False
) -> Iterator[BatchResult]:
    """Generate one batch after the other and yield the result of each.

    Args:
        pipe: a loaded pipeline.
        batches: samples of each call, see `plan.plan_batches`.
        warm_up: run one additional call first, so that one-time work such as compilation is not part of the time of the
            first batch.
    """
    if warm_up and batches:
        run_warm_up(pipe, batches[0])
    for batch in batches:
        yield run_batch(pipe, batch)


def run_warm_up(pipe: Any, batch: Sequence[Sample]) -> None:
    """Run a call whose result is dropped, so that one-time work such as compiling kernels is done."""
    # Accelerated runs have several kinds of steps, which may need different kernels. Only a full call runs them all.
    plain = not installations_of(pipe)
    run_batch(pipe, batch, **({"num_inference_steps": WARM_UP_STEPS} if plain else {}))


def progress_bar(**options: Any) -> Any:
    """Return a tqdm progress bar on stderr that counts samples."""
    from tqdm import tqdm

    return tqdm(**{"unit": "sample"} | options)


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Switch off the progress bar of the pipeline, which would show one bar for each batch."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
