"""Tests of the Triton kernels in Triton's interpreter, in a separate process with TRITON_INTERPRET=1.

    TRITON_INTERPRET=1 pytest -o addopts="--import-mode=importlib --strict-markers -ra" tests/triton

The variable is read when a kernel is defined, and run-time shape checks would rewrite the kernels.
"""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if "tests/triton" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason="runs with TRITON_INTERPRET=1, see `make test`")
            )
