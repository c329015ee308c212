"""Bounds on resources: each bound can be missed, and each exemption applies."""

import dataclasses

import pytest

from dit_accel.kernels.machine_code import Loop
from dit_accel.kernels.usage import Usage, missed

LOOP = Loop({"matrix": 12}, {}, {"HGMMA.64x64x16": 12}, copied=128, wait=2)
GOOD = Usage(
    registers=200, spills=0, stack=0, shared=96 * 1024, programs=1, matrix={"wgmma": 24}, async_copies=70, warps=8, stages=3,
    tile={"TQ": 128}, loops=(LOOP, LOOP), flops=(1, 1), predicted=(None, None),
)  # fmt: skip


def of(**changes):
    return dataclasses.replace(GOOD, **changes)


def loops(**changes):
    return of(loops=(LOOP, dataclasses.replace(LOOP, **changes)))


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        (GOOD, []),
        (of(spills=4), ["spills"]),
        (loops(instructions={**LOOP.instructions, "local": 1}), ["spills in loop 2"]),
        (of(shared=228 * 1024, programs=0), ["too much shared memory"]),
        (of(programs=0), ["too many registers for one program on an SM"]),
        (of(loops=()), ["no main loop in the machine code"]),
        (loops(products={"HMMA.16816.F32": 8}), ["no wgmma in loop 2, but mma.sync"]),
        (loops(wait=0), ["async_wait 0 in loop 2"]),
        (loops(wait=None), ["no asynchronous copies in loop 2"]),
        (loops(wait=None, copied=8), []),  # indices
        (loops(wait="mbarrier", copied=None), []),
        (dataclasses.replace(loops(wait=0), stages=1), []),
    ],
)
def test_bounds(usage, found):
    assert missed("90", 128, usage) == found


def test_bounds_of_other_chips():
    assert missed("90", 256, of(spills=128)) == []
    assert missed("90", 256, of(spills=132)) == ["spills"]
    small = of(loops=(dataclasses.replace(LOOP, products={"HMMA.16816.F32": 64}),), spills=128)
    assert missed("120", 128, small) == []
    assert missed("80", 128, small) == ["spills"]
    amd = dataclasses.replace(LOOP, products={"v_mfma_f32_32x32x8_bf16": 8}, wait=None)
    assert missed("gfx942", 128, of(loops=(amd,), shared=0)) == []


def test_kernel_without_loops():
    assert missed("90", 128, of(flops=(), loops=(), matrix={"mma.sync": 8})) == []
