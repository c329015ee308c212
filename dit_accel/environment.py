"""Versions and hardware for records and bug reports, without host names and paths."""

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results, by name."""
    names = ("dit-accel", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Return a description of the hardware, without the name of the computer."""
    gpu = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
