"""Ahead-of-time compiles, in a process without the interpreter and without run-time shape checks.

pytest -o addopts="--import-mode=importlib --strict-markers -ra" tests/aot
"""

import os

import pytest


def pytest_collection_modifyitems(config, items):
    checked = config.getoption("jaxtyping_packages", None)
    if not checked and os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if "tests/aot" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason="runs in a process that compiles, see `make test`")
            )
