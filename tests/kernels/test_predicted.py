"""Prediction of a loop: bounds computed by hand, and cases without a prediction."""

import dataclasses

import pytest

from dit_accel.kernels.chips import CHIPS
from dit_accel.kernels.machine_code import Loop
from dit_accel.kernels.predicted import predict

# The loop over full blocks of a forward kernel with a tile of 128 x 64, head_dim 128 and 8 warps on sm_90.
FORWARD = Loop(
    instructions={
        "fp": 172, "uniform": 57, "special": 34, "int": 30, "async_copy": 16, "convert": 16, "imad": 14, "matrix": 12,
        "barrier": 8, "shuffle": 8, "wait": 5, "shared_load": 5,
    },
    names={"FMNMX": 36, "BAR": 2, "WARPGROUP": 4},
    products={"HGMMA.64x64x16.F32.BF16 shared": 8, "HGMMA.64x128x16.F32.BF16": 4},
    copied=128,
    wait=2,
)  # fmt: skip
FLOPS = 4 * 128 * 64 * 128
WAITS_FOR_ALL = dataclasses.replace(FORWARD, wait=0)


def test_exposed_loads_cost_time():
    carried = predict(FORWARD, FLOPS, 8, 1, CHIPS["90"])
    exposed = predict(WAITS_FOR_ALL, FLOPS, 8, 1, CHIPS["90"])
    assert carried is not None
    assert exposed is not None
    assert (carried.limit, exposed.limit) == ("serial", "serial")
    assert 0.45 < carried.share < 0.6
    assert 0.35 < exposed.share < 0.45
    assert not carried.bound


def test_programs_side_by_side_hide_each_other_up_to_the_busiest_pipe():
    alone, *more = (predict(WAITS_FOR_ALL, FLOPS, 8, n, CHIPS["90"]) for n in (1, 2, 50))
    assert alone.share < more[0].share <= more[1].share
    assert more[1].limit == "l2"
    # 128 bytes of 256 threads, 24 bytes a clock; 1,024 clocks of matrix units.
    assert more[1].share == pytest.approx(1024 / (128 * 256 / 24))


def test_special_functions_limit_small_head_dims():
    loop = dataclasses.replace(
        FORWARD, instructions={"special": 68}, products={}, names={}, copied=0
    )
    found = predict(loop, 4 * 128 * 64 * 64, 8, 50, CHIPS["90"])
    assert found.limit == "special"
    assert found.share == pytest.approx(512 / (68 * 8 * 32 / 16))


def test_products_that_warps_repeat_count_once():
    products = {"HMMA.16816.F32.BF16": 96}  # of 8 warps, for a tile that needs two thirds of them
    loop = Loop({"matrix": 96}, {}, products, copied=0, wait=2)
    found = predict(loop, 64 * 8 * 2 * 16 * 8 * 16, 8, 1, CHIPS["80"])
    assert found.share == pytest.approx(2 / 3)
    assert str(found) == "<= 67"


def test_narrow_wgmma_is_bound_by_shared_memory():
    products = {"HGMMA.64x16x16.F32.BF16 shared": 16}
    loop = Loop({"matrix": 16}, {}, products, copied=0, wait="mbarrier")
    found = predict(loop, 16 * 2 * 64 * 16 * 16, 4, 50, CHIPS["90"])
    assert found.share == pytest.approx(8 / 20)  # 16 + 16 / 4 clocks of reads for 8 of products


@pytest.mark.parametrize("arch", CHIPS)
def test_share_is_an_upper_bound_where_latencies_are_not_known(arch):
    found = predict(FORWARD, FLOPS, 8, 1, CHIPS[arch])
    assert 0 < found.share <= 1
    assert found.bound == (CHIPS[arch].l2_latency is None)
    assert str(found).startswith("<= ") == found.bound


def test_no_number_without_products_or_programs():
    assert predict(FORWARD, None, 8, 1, CHIPS["90"]) is None
    assert predict(FORWARD, FLOPS, 8, 0, CHIPS["90"]) is None


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared_kib", "programs"),
    [
        ("90", 249, 4, 81, 2),  # registers
        ("90", 128, 4, 113, 2),  # shared memory, to the last KiB
        ("90", 128, 4, 114, 1),
        ("90", 32, 4, 0, 16),  # 64 warps
        ("89", 32, 4, 0, 12),  # 48 warps
        ("120", 170, 8, 100, 0),
        ("80", 96, 8, 0, 2),  # five warps in a quarter of the SM: 20, not 21
        ("gfx942", 302, 4, 40, 1),
        ("gfx942", 256, 4, 20, 2),
    ],
)
def test_programs_on_an_sm(arch, registers, warps, shared_kib, programs):
    assert CHIPS[arch].programs(registers, warps, shared_kib * 1024) == programs


def test_tensor_memory_limits_programs():
    assert CHIPS["100"].programs(64, 4, 0, tensor_columns=256) == 2
