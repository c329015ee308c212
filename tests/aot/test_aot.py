"""Kernels compile for sm_90, and attention kernels for sm_80, without spills; loops use matrix instructions and asynchronous copies."""

import functools

import pytest
import torch

from dit_accel.kernels.aot import compile_launch
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.catalogue import catalogue
from dit_accel.kernels.usage import missed

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
# Modes that are compiled for sm_90 only, next to another mode of the same kernel.
LIKE_90 = (
    "forward/split rows, packed heads",
    "forward/ragged",
    "linear_columns/ragged",
    "columns/causal",
    "column_sums/last queries",
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


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        *(("90", name) for name in (*KERNELS, *SMALL)),
        *(("80", name) for name in KERNELS if name not in LIKE_90),
    ],
)
def test_kernel_keeps_every_bound(chip, name):
    """Spills, shared memory, matrix instructions and asynchronous copies keep the bounds of `usage.missed`."""
    usage = compile_launch(launches(chip)[name], Target("cuda", chip))
    assert missed(chip, 128, usage) == []
    assert bool(usage.loops) == (name in KERNELS)
    assert len(usage.loops) == len(usage.flops)


def test_catalogue_covers_every_kernel_of_a_chip():
    kernels = {name.partition("/")[0] for name in launches("90")}
    assert kernels == {name.partition("/")[0] for name in (*KERNELS, *SMALL)}
