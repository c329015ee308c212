"""Token budgets of selectors: a share of the stored tokens, or a number of tokens."""

import math
from typing import Any

from dit_accel.config.base import is_int


def check_budget(name: str, value: Any) -> None:
    """Check that a budget is a share (float) in (0, 1] or a number of tokens (int).

    Raises:
        ValueError: the value is neither.
    """
    if is_int(value) and value >= 1:
        return
    if isinstance(value, float) and 0 < value <= 1:
        return
    raise ValueError(
        f"{name}={value!r}: must be a share (float) in (0, 1] or a number of tokens (int) >= 1"
    )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check that an option is an int >= `least`.

    Raises:
        ValueError: the value is not an int, or too small.
    """
    if not is_int(value) or value < least:
        raise ValueError(f"{name}={value!r}: must be an int >= {least}")


def check_share(name: str, value: Any) -> None:
    """Check that an option is a number in [0, 1].

    Raises:
        ValueError: the value is not a number in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: must be a share in [0, 1]")


def tokens_of(budget: float | int, total: int, granule: int = 1) -> int:
    """Return the number of tokens in a budget, at most `total`.

    Args:
        budget: share or number of tokens, see `check_budget`.
        total: number of stored tokens, a multiple of `granule`.
        granule: the result is rounded up to a multiple of this.
    """
    # Rounding keeps 0.1 * 30 = 3.0000000000000004 from becoming 4.
    count = budget if isinstance(budget, int) else math.ceil(round(budget * total, 6))
    return min(total, -(-count // granule) * granule)
