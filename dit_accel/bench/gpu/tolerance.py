"""Allowed errors of kernels against the plain formulas."""

import torch
from torch import Tensor

HUGE = 1e300  # stands for NaN and infinity, which JSON does not support
EXACT = 1e-5
"""Allowed error of fp32 kernels, as a share of the largest result of a problem."""


def errors(
    ours: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor] | None
) -> dict[str, list[float]]:
    """Return `[error, allowed error]` by name.

    Args:
        ours: results of the kernels.
        exact: results of the formula in fp64.
        plain: results of the formula in the dtype of the kernels. Allowed is twice their error plus a rounding floor.
            Default: allowed is `EXACT` * max(1, largest exact result).
    """
    finite = {name: x.isfinite() for name, x in exact.items()}
    largest = max([1.0, *(x[finite[n]].abs().max().item() for n, x in exact.items())])
    found = {}
    for name, reference in exact.items():
        mask, out = finite[name], ours[name].double()
        if not torch.equal(out.isinf(), reference.isinf()):
            found[name] = [HUGE, 0.0]
            continue
        out, reference = out[mask], reference[mask]
        error = (out - reference).abs().max().item()
        # Comparisons with NaN are False.
        error = error if error < HUGE else HUGE
        found[name] = [
            error,
            _allowed(reference, None if plain is None else plain[name][mask], largest),
        ]
    return found


def _allowed(reference: Tensor, plain: Tensor | None, largest: float) -> float:
    if plain is None:
        return EXACT * largest
    rounded = reference.to(plain.dtype)
    floor = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()
    # If the plain formula overflows, only the rounding floor is allowed, because the kernel need not overflow.
    error = torch.where(plain.isfinite(), plain, rounded).double() - reference
    return 2 * error.abs().max().item() + floor
