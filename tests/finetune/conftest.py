"""Fixtures of the tests of fine-tuning."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def quick(tmp_path):
    """A folder in memory, where syncing takes no time; on the disk if there is none."""
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    except OSError:
        yield tmp_path
