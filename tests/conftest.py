"""One quiet core, no network, and unwritten memory that shows: what every test here relies on."""

import os

# Before numpy and torch load: they read these once.
os.environ.update(
    OMP_WAIT_POLICY="PASSIVE",
    OPENBLAS_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
)

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile(
    "dit_accel", deadline=None, max_examples=60, derandomize="CI" in os.environ
)
settings.load_profile("dit_accel")

# Helpers that every test may import by name, wherever pytest was started. Putting their folder on
# sys.path instead would let tests/kernels pose as the Hugging Face package `kernels`.
for _path in ("tolerance.py", "kernels/plan_cases.py"):
    _spec = importlib.util.spec_from_file_location(Path(_path).stem, Path(__file__).parent / _path)
    _module = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _nan_filled(empty):
    """`empty`, but its result is all NaN when code of dit_accel called it."""

    @functools.wraps(empty)
    def wrapper(*args, **kwargs):
        out = empty(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "dit_accel" and out.is_floating_point():
            out.detach().fill_(math.nan)
        return out

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def unwritten_memory_is_nan():
    """An output that dit_accel allocates and forgets to write fails every comparison."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _nan_filled(getattr(owner, name)))
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked():
    """Switch the shape checks of the test run off: users do without them and need our own errors."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
