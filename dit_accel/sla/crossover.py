"""Where sparse attention starts to pay off, as measured by `kernels/bench_attention.py`."""

import functools
import json
from importlib import resources

UNMEASURED = 16384
NEVER = 2**62


@functools.cache
def _table() -> list[dict]:
    text = resources.files("dit_accel.sla").joinpath("crossover.json").read_text(encoding="utf-8")
    return json.loads(text)["rows"]


def min_sparse_length(device_type: str, *, topk: float, block: int) -> int:
    """Shortest sequence at which sparse beats dense on this kind of device, at most `NEVER`.

    Reads the measured rows that are no easier than the request: at least as many keys kept, and
    blocks no larger (both slow sparse attention down). The shortest of their lengths is safe. Of
    devices without any measurement a cautious guess: long sequences of which at most half is read.
    """
    rows = [row for row in _table() if row["device"] == device_type]
    if not rows:
        return UNMEASURED if topk <= 0.5 else NEVER
    lengths = [row["min_length"] for row in rows if row["topk"] >= topk and row["block"] <= block]
    return min((n for n in lengths if n is not None), default=NEVER)
