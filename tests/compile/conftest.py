"""What torch.compile and torch.library say of the operators.

    pytest -o addopts="--import-mode=importlib --strict-markers -ra" tests/compile

Run-time shape checks cannot be traced, so these tests run in a process without them.
"""

import pytest


def pytest_collection_modifyitems(config, items):
    if not config.getoption("jaxtyping_packages", None):
        return
    for item in items:
        if "tests/compile" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason="runs without run-time shape checks, see `make test`")
            )
