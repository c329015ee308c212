"""The most memory that a block of code held: on the GPU, or of this process."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")


@dataclass
class Peak:
    """Filled in when the block ends."""

    size: int | None = None
    """Bytes, the weights of the model included; None where the system does not tell."""
    of: str | None = None
    """"gpu": what torch had allocated there. "process": resident memory, Python and libraries included."""


@contextlib.contextmanager
def peak_memory(device: Any) -> Iterator[Peak]:
    """Measure from here to the end of the block.

    A process's peak can be forgotten on Linux only; elsewhere a method would inherit the peak of those
    before it, and nothing is measured.
    """
    peak = Peak()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.size, peak.of = torch.cuda.max_memory_allocated(device), "gpu"
        return
    forgotten = device.type == "cpu" and _forget()
    yield peak
    if forgotten and (size := _high_water()) is not None:
        peak.size, peak.of = size, "process"


def _forget() -> bool:
    """Whether the kernel now counts from what is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what malloc keeps would be counted
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROC / "clear_refs").write_text("5")  # forgets the high-water mark (proc(5))
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
