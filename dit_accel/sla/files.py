"""Former module of `read_adapter`, which is now `dit_accel.checkpoint.file.read_checkpoint`; old programs still work."""

from importlib import import_module
from typing import Any


def read_adapter(path: Any) -> Any:
    """See `dit_accel.checkpoint.file.read_checkpoint`."""
    # By name, at the call: sla/ stands below checkpoint/ and imports nothing from it.
    return import_module("dit_accel.checkpoint.file").read_checkpoint(path)
