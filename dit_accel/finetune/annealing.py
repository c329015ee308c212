"""`topk_at`: schedule of `topk`, the fraction of key blocks that are read, during sparsity annealing."""

from dit_accel.config.base import check_fraction


def topk_at(step: int, *, start: float, end: float, steps: int) -> float:
    """Return the value of `topk` at one step of a geometric schedule: `start * (end / start) ** (step / steps)`.

    Each step multiplies `topk` by the same factor. A linear schedule would remove most of the remaining blocks in
    its last steps, where quality suffers most.

    Args:
        step: index of the step, starting at 0.
        start: `topk` at step 0, in (0, 1]. May be smaller than `end`.
        end: `topk` from step `steps` on, in (0, 1].
        steps: length of the schedule in steps. 0 returns `end` at every step.

    Raises:
        ValueError: if an argument is out of range. The message names the argument.
    """
    check_fraction("start", start)
    check_fraction("end", end)
    for name, value in (("step", step), ("steps", steps)):
        if value < 0:
            raise ValueError(f"{name}={value}: must be at least 0")
    if step >= steps:
        return end
    return start * (end / start) ** (step / steps)
