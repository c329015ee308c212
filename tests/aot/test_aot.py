"""Each kernel compiles for sm_80 and sm_90 without spills, and uses what the chip has."""

import functools

import pytest
import torch

from dit_accel.kernels.aot import compile_launch
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.catalogue import catalogue

CHIPS = {"80": ("mma.sync", 163), "90": ("wgmma", 227)}
# One mode of each kernel, the one that needs most; and what walks no tiles.
KERNELS = (
    "forward/linear subtracted",
    "rows/linear subtracted",
    "columns/causal",
    "gathered/columns",
    "linear_columns/linear subtracted",
    "state/linear subtracted",
)
SMALL = ("merge/split rows", "pool/router", "pool/spread")


@functools.cache
def launches(chip: str):
    return catalogue(Target("cuda", chip), 128, torch.bfloat16)


@pytest.mark.parametrize("name", [*KERNELS, *SMALL])
@pytest.mark.parametrize("chip", CHIPS)
def test_kernel_compiles(chip, name):
    matrix, shared_kib = CHIPS[chip]
    usage = compile_launch(launches(chip)[name], Target("cuda", chip))
    assert usage.spills == 0
    assert usage.shared <= shared_kib * 1024
    if name in KERNELS:
        assert usage.matrix.get(matrix, 0) > 0
        assert usage.async_copies > 0


def test_catalogue_covers_every_kernel_of_a_chip():
    kernels = {name.partition("/")[0] for name in launches("90")}
    assert kernels == {name.partition("/")[0] for name in (*KERNELS, *SMALL)}
