"""Former module of `read_adapter`, which is now `dit_accel.checkpoint.file.read_checkpoint`; old programs still work."""

from importlib import import_module
from typing import Any


def read_adapter(path: Any) -> Any:
    """See `dit_accel.checkpoint.file.read_checkpoint`."""
    # At the call, by name: sla/ stands below checkpoint/ and must not import from it.
    package = __name__.partition(".")[0]
    return import_module(f"{package}.checkpoint.file").read_checkpoint(path)
