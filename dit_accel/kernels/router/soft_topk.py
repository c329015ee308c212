"""Soft top-k: weights between 0 and 1 that sum to k in each row, differentiable with respect to the scores."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.precision import wide

_HALVINGS = {torch.float32: 40, torch.float64: 64}


def soft_topk(
    scores: Float[Tensor, "... n"], count: int | Int[Tensor, "... 1"], *, temperature: float
) -> Float[Tensor, "... n"]:
    """Return `sigmoid((scores - t) / temperature)`, with a t for each row so that its weights sum to `count`.

    For small temperatures the weights approach 1 for the `count` best scores and 0 for all others. Differentiable with
    respect to the scores. The gradient includes the dependence of t on the scores, so it sums to 0 in each row.

    Args:
        scores: finite logits `[..., n]`.
        count: sum of the weights of each row; one number, or one for each row. A row with `count >= n` gets ones,
            without a gradient.
        temperature: > 0, in units of the scores.

    Raises:
        ValueError: a number is out of range; the message names the argument.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: accepted is a number > 0")
    if isinstance(count, int) and count < 1:
        raise ValueError(f"count={count}: accepted is an int >= 1")
    scores = scores.to(wide(scores))
    n = scores.shape[-1]
    goal = torch.as_tensor(count, dtype=scores.dtype, device=scores.device)
    every = goal >= n
    goal = torch.where(every, n / 2, goal)
    x = (scores - _thresholds(scores.detach(), goal, temperature)) / temperature
    weights = torch.sigmoid(x)
    # One Newton step. Its derivative is that of the exact solution (implicit function theorem).
    slope = (weights * (1 - weights)).sum(-1, keepdim=True).detach()
    slope = slope.clamp(min=torch.finfo(x.dtype).tiny)
    shift = (goal - weights.sum(-1, keepdim=True)) / slope
    return torch.where(every, torch.ones_like(x), torch.sigmoid(x + shift))


@torch.no_grad()
def _thresholds(scores: Tensor, goal: Tensor, temperature: float) -> Tensor:
    """Return t of each row by bisection, `[..., 1]`.

    t has the units of the scores, which is more accurate than a shift of `scores / temperature`.
    """
    margin = temperature * (scores.shape[-1] / goal - 1).log().abs()
    low = scores.amin(-1, keepdim=True) - margin
    high = scores.amax(-1, keepdim=True) + margin
    for _ in range(_HALVINGS[scores.dtype]):
        middle = (low + high) / 2
        above = torch.sigmoid((scores - middle) / temperature).sum(-1, keepdim=True) > goal
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2
