"""Deprecated home of `read_adapter`, which is now `dit_accel.checkpoint.file.read_checkpoint`."""

from importlib import import_module
from typing import Any


def read_adapter(path: Any) -> Any:
    """See `dit_accel.checkpoint.file.read_checkpoint`."""
    # Imported by name when called, because sla/ must not depend on checkpoint/.
    package = __name__.partition(".")[0]
    return import_module(f"{package}.checkpoint.file").read_checkpoint(path)
