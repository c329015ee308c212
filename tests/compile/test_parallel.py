"""Compiled blocks under context parallelism."""

from ..runtime.test_parallel import run_worker


def test_compiled_blocks_equal_plain_ones(tmp_path):
    for case in run_worker(tmp_path, "compiled"):
        assert all(x["error"] < 1e-5 for x in case["compiled"].values())
        # As in one process: all tokens, and some; Stable Diffusion 3 has another last block.
        assert {family: x["graphs"] for family, x in case["compiled"].items()} == {
            "wan": 2,
            "sd3": 4,
        }
