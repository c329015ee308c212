"""Number of examples that the property tests draw."""

import os

LONG = "DIT_ACCEL_CASES" in os.environ
"""Whether this is the long run."""


def cases(short: int, share: int = 1) -> int:
    """Return `short`, or the number in `DIT_ACCEL_CASES` divided by `share` if that is more (see `make test-long`)."""
    return max(short, int(os.environ.get("DIT_ACCEL_CASES", "0")) // share)
