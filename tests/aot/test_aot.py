"""Each kernel compiles for sm_80 and sm_90 without spills, and its loops use matrix instructions and asynchronous copies."""

import functools

import pytest
import torch

from dit_accel.kernels.aot import compile_launch
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.catalogue import catalogue
from dit_accel.kernels.usage import missed

CHIPS = ("80", "90")
# The most demanding mode of each kernel, the default mode on Hopper, and kernels without a main loop.
KERNELS = (
    "forward/plain, 128 rows",
    "forward/plain, packed heads",
    "forward/split rows, packed heads",
    "forward/linear complement",
    "rows/linear complement",
    "columns/causal",
    "gathered/columns",
    "linear_columns/linear complement",
    "state/linear complement",
    "columns/ragged",
    "linear_columns/ragged",
    "forward/ragged",
    "row_sums/last queries",
    "column_sums/last queries",
    "column_sums/unread",
    "diagonal_sums/last queries",
)
SMALL = (
    "lut/codes",
    "lut/padded",
    "lut/rotated",
    "merge/split rows",
    "pool/router",
    "pool/spread",
    "scores/router",
    "scores/spread",
    "select/topk",
    "select/top_p",
    "totals/linear all",
    "unread/shared_softmax",
)


@functools.cache
def launches(chip: str):
    return catalogue(Target("cuda", chip), 128, torch.bfloat16)


@pytest.mark.parametrize("name", [*KERNELS, *SMALL])
@pytest.mark.parametrize("chip", CHIPS)
def test_kernel_keeps_every_bound(chip, name):
    """Spills, shared memory, matrix instructions and asynchronous copies keep the bounds of `usage.missed`."""
    usage = compile_launch(launches(chip)[name], Target("cuda", chip))
    assert missed(chip, 128, usage) == []
    assert bool(usage.loops) == (name in KERNELS)
    assert len(usage.loops) == len(usage.flops)


def test_catalogue_covers_every_kernel_of_a_chip():
    kernels = {name.partition("/")[0] for name in launches("90")}
    assert kernels == {name.partition("/")[0] for name in (*KERNELS, *SMALL)}
