"""`topk_at`: the share of key blocks that is read in each step while sparsity is annealed."""

from dit_accel.config.base import check_fraction


def topk_at(step: int, *, start: float, end: float, steps: int) -> float:
    """Return `topk` in a step of a geometric schedule from `start` to `end`.

    Each step changes `topk` by the same factor. A linear schedule would drop most of the blocks that are still read
    in its last steps, where quality suffers most.

    Args:
        step: number of the step, from 0.
        start: `topk` at step 0, in (0, 1]. It may be smaller than `end`.
        end: `topk` from step `steps` on, in (0, 1].
        steps: number of steps that the schedule takes; 0: `end` from the first step on.

    Raises:
        ValueError: a number out of range; it names the argument.
    """
    check_fraction("start", start)
    check_fraction("end", end)
    for name, value in (("step", step), ("steps", steps)):
        if value < 0:
            raise ValueError(f"{name}={value}: must be at least 0")
    if step >= steps:
        return end
    return start * (end / start) ** (step / steps)
