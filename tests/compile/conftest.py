"""Reset torch.compile before each test, and compile in this process."""

import os

import pytest
import torch

# Inductor would start a pool of processes, each of which imports torch, for a few small kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
