"""Sequence length above which sparse attention is faster, as measured by `kernels/bench_attention.py`."""

import functools
import json
from importlib import resources

UNMEASURED = 16384
"""Length that is used for devices without measurements (not benchmarked)."""
NEVER = 2**62
"""Length that stands for "sparse attention is never faster"."""


@functools.cache
def _table() -> list[dict]:
    text = resources.files("dit_accel.sla").joinpath("crossover.json").read_text(encoding="utf-8")
    return json.loads(text)["rows"]


def min_sparse_length(device_type: str, *, topk: float, block: int) -> int:
    """Return the shortest sequence length at which sparse attention is faster than dense attention, at most `NEVER`.

    Uses the measurements that are at least as unfavourable as the request: at least as large a `topk`, and blocks that
    are not larger. The shortest of their lengths is a safe bound. Devices without measurements use `UNMEASURED`, and
    `NEVER` for topk > 0.5.

    Args:
        device_type: type of the device, such as "cuda".
        topk: fraction of the key blocks that is read.
        block: number of keys in a block.
    """
    rows = [row for row in _table() if row["device"] == device_type]
    if not rows:
        return UNMEASURED if topk <= 0.5 else NEVER
    lengths = [row["min_length"] for row in rows if row["topk"] >= topk and row["block"] <= block]
    return min((n for n in lengths if n is not None), default=NEVER)
