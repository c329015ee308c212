"""Compiled blocks under context parallelism."""

from ..runtime.test_parallel import run_worker


def test_compiled_blocks_equal_plain_ones(tmp_path):
    assert all(x["compiled"] < 1e-5 for x in run_worker(tmp_path, "compiled"))
