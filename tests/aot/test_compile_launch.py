"""Resources that `compile_launch` reads from a small kernel, compiled for several chips."""

import dataclasses
import functools

import pytest
import torch
import triton
import triton.language as tl

from dit_accel.kernels.aot import compile_launch
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.usage import Usage

CUDA = ("80", "89", "90", "100", "120")
MATRIX = {"80": "mma.sync", "89": "mma.sync", "90": "wgmma", "100": "tcgen05", "120": "mma.sync", "gfx942": "mfma"}  # fmt: skip


def listed_blocks(
    Q, K, O, INDEX, count, length, N: tl.constexpr, D: tl.constexpr, CARRY: tl.constexpr
):
    """Sum q k^T k over listed blocks. CARRY: load the next index one step ahead."""
    o_n, o_d = tl.arange(0, N), tl.arange(0, D)
    b_q = tl.load(Q + o_n[:, None] * D + o_d[None, :])
    b_o = tl.zeros([N, D], tl.float32)
    i_next = tl.load(INDEX, mask=count > 0, other=0)
    for t in tl.range(0, count):
        if CARRY:
            i_k = i_next
            i_next = tl.load(INDEX + t + 1, mask=t + 1 < count, other=0)
        else:
            i_k = tl.load(INDEX + t)
        b_k = tl.load(K + (i_k * N + o_n)[:, None] * D + o_d[None, :])
        b_s = tl.dot(b_q, tl.trans(b_k))
        b_o = tl.dot(b_s.to(b_k.dtype), b_k, b_o)
    tl.store(O + (length + o_n)[:, None] * D + o_d[None, :], b_o.to(O.dtype.element_ty))


SPECIALISED = triton.jit(listed_blocks)
GENERAL = triton.jit(listed_blocks, do_not_specialize=["count", "length"])


def launch(carry: bool, *, kernel=GENERAL, count=13, length=7, stages=3) -> Launch:
    q, k, o = (torch.empty(4096, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    index = torch.empty(64, dtype=torch.int32, device="meta")
    arguments = {"Q": q, "K": k, "O": o, "INDEX": index, "count": count, "length": length}
    return Launch(kernel, (1,), arguments, {"N": 64, "D": 128, "CARRY": carry}, 4, stages)


def target_of(chip: str) -> Target:
    return Target("hip" if chip.startswith("gfx") else "cuda", chip)


@functools.cache
def usual(chip: str) -> Usage:
    """Return the usage of `launch(True)`, compiled once for each chip."""
    return compile_launch(launch(True), target_of(chip))


@pytest.mark.parametrize("chip", [*CUDA, "gfx942"])
def test_facts_of_a_loop(chip):
    usage = usual(chip)
    (loop,) = usage.loops
    assert set(usage.matrix) == {MATRIX[chip]}
    assert 0 < loop.instructions["matrix"] <= usage.matrix[MATRIX[chip]]
    assert usage.spills == 0
    assert 0 < usage.registers <= 512
    assert usage.programs >= 1
    # A block of 64 x 128 numbers of two bytes, divided among the threads, and at most two indices.
    threads = 4 * (64 if chip == "gfx942" else 32)
    assert 64 * 128 * 2 / threads <= loop.copied <= 64 * 128 * 2 / threads + 8
    (prediction,) = usage.predicted
    assert prediction is not None
    assert 0 < prediction.share <= 1
    if chip == "gfx942":
        assert loop.wait is None
        assert usage.async_copies == 0
    else:
        assert loop.wait > 0
        assert loop.instructions["async_copy"] > 0


@pytest.mark.parametrize("chip", ["80", "90"])
def test_wait_is_0_when_the_index_is_loaded_in_the_loop(chip):
    (loop,) = compile_launch(launch(False), Target("cuda", chip)).loops
    assert loop.wait == 0


@pytest.mark.parametrize("chip", ["80", "90"])
def test_wait_is_0_with_two_stages(chip):
    (loop,) = compile_launch(launch(True, stages=2), Target("cuda", chip)).loops
    assert loop.wait == 0


@pytest.mark.parametrize("chip", ["80", "gfx942"])
@pytest.mark.parametrize("values", [{"count": 1, "length": 1}, {"count": 16, "length": 32}])
def test_do_not_specialize_gives_one_code_for_all_values(chip, values):
    assert compile_launch(launch(True, **values), target_of(chip)) == usual(chip)


def test_other_arguments_are_specialised():
    target = Target("cuda", "80")
    general = compile_launch(launch(True, kernel=SPECIALISED), target)
    one = compile_launch(launch(True, kernel=SPECIALISED, count=1), target)
    assert general.loops
    assert not one.loops  # a loop of one step is none


def test_alignment_of_pointers_is_that_of_the_tensors():
    """Asynchronous copies of 16 bytes need pointers that are multiples of 16."""
    aligned = launch(True)
    k = torch.empty(4096 * 128 + 1, dtype=torch.bfloat16)[1:].view(4096, 128)
    shifted = dataclasses.replace(aligned, arguments={**aligned.arguments, "K": k})
    target = Target("cuda", "80")
    assert usual("80").loops[0].instructions["async_copy"] > 0
    assert compile_launch(shifted, target).loops[0].instructions.get("async_copy", 0) <= 1
