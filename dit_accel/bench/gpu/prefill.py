"""Checks and times of sparse prefill with long prompts: sums over a few queries, and rows with very many blocks."""

import dataclasses
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.bench.gpu.device import Device, Result
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.timing import Functions
from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.kernels.query_sums import column_sums, last_query_sums, torch_sums

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 131072, 32, 8, 128
LAST = 64
SUM_TOLERANCE = 2e-3
"""Allowed error of a sum, as a share of the largest sum. It is dominated by exponentials of fp32 products."""
SUMS = {
    "d=128": (128, torch.bfloat16, LAST),
    "d=72": (72, torch.bfloat16, 100),
    "d=256": (256, torch.bfloat16, LAST),
    "fp16, d=64": (64, torch.float16, LAST),
    "fp32, d=64": (64, torch.float32, LAST),
}


def _queries_and_keys(
    device: Device, q_len: int, length: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    q, k = (
        torch.randn(2 if length < LENGTH else 1, n, h, d, device=device.place)
        .to(dtype)
        .transpose(1, 2)
        for n, h in ((q_len, heads), (length, kv_heads))
    )
    return q, k


def check_sums(device: Device, d: int, dtype: torch.dtype, last: int) -> Result:
    """Compare both functions with the reference implementation in fp64."""
    q, k = _queries_and_keys(device, 700, 1003, 4, 2, d, dtype)
    scale, rows, block = d**-0.5, range(5, 700, 11), 64
    read = torch.rand(1, 4, 11, 16, device=device.place) < 0.4

    def sums() -> list[Tensor]:
        unread = column_sums(q, k, rows, scale=scale, read=read, block=block)
        return [*last_query_sums(q, k, scale=scale, last=last), unread]

    with device.poisoned():
        ours = sums()
    if device.dry:
        return {"passed": True}
    exact = (q.double(), k.double())
    expected = [
        *torch_sums.last_query_sums(*exact, scale, last),
        torch_sums.column_sums(*exact, rows, scale, read, block),
    ]
    errors = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, expected, strict=True)
    ]
    repeats = all(torch.equal(a, b) for a, b in zip(ours, sums(), strict=True))
    named = dict(zip(("columns", "diagonals", "unread"), errors, strict=True))
    passed = repeats and all(x <= SUM_TOLERANCE for x in errors)
    return {
        "passed": passed,
        "repeats": repeats,
        "errors": {n: [x, SUM_TOLERANCE] for n, x in named.items()},
    }


@torch.no_grad()
def time_sums(device: Device, found: dict[str, Result]) -> Result:
    """Time the sums for a long prompt, with the kernels and in torch."""
    q, k = _queries_and_keys(device, LENGTH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16)
    scale, n = HEAD_DIM**-0.5, LENGTH // 128
    read = torch.rand(1, HEADS, n, n, device=device.place) < 0.1
    rows = range(1000, LENGTH, LENGTH // LAST)
    functions = {
        "last queries": lambda: last_query_sums(q, k, scale=scale, last=LAST),
        "last queries, torch": lambda: torch_sums.last_query_sums(q, k, scale, LAST),
        "columns": lambda: column_sums(q, k, rows, scale=scale, read=read, block=128),
        "columns, torch": lambda: torch_sums.column_sums(q, k, rows, scale, read, 128),
    }
    return {"length": LENGTH, "ms": device.times(functions, 6)}


def triangle(device: Device, length: int, block: int, tail: int = 128) -> SparsePlan:
    """Return a plan of the first block, a window of 512 tokens, and every key for the last `tail` queries."""
    n = length // block
    distance = torch.arange(n, device=device.place)[:, None] - torch.arange(n, device=device.place)
    mask = (distance >= 0) & (distance <= 512 // block)
    mask[:, 0] = True
    mask[n - tail // block :] = True
    return SparsePlan.from_block_mask(
        mask[None, None],
        block_q=block,
        block_k=block,
        q_len=length,
        kv_len=length,
        causal=True,
        long_rows=torch.arange(n - tail // block, n, device=device.place),
    )


@torch.no_grad()
def time_triangle(device: Device, found: dict[str, Result], *, block: int) -> Result:
    """Time the plan `triangle` on a long prompt, with and without split rows, and causal flash attention."""
    q, k = _queries_and_keys(device, LENGTH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16)
    v = torch.randn_like(k)
    plan = triangle(device, LENGTH, block)
    whole = dataclasses.replace(plan, long_rows=None)
    functions: Functions = {
        "split": functools.partial(block_sparse_attention, q, k, v, plan),
        "whole": functools.partial(block_sparse_attention, q, k, v, whole),
        "flash": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    times = device.times(functions, 4, optional=("flash",))
    if device.dry:
        return {"passed": True, "length": LENGTH, "ms": times}
    error = (functions["split"]() - functions["whole"]()).abs().max().item()
    return {"passed": error <= 2e-2, "length": LENGTH, "error": error, "ms": times}


def sub_steps() -> Iterator[SubStep]:
    for name, (d, dtype, last) in SUMS.items():

        def check(
            device: Device,
            found: dict[str, Result],
            d: int = d,
            dtype: torch.dtype = dtype,
            last: int = last,
        ) -> Result:
            return check_sums(device, d, dtype, last)

        yield SubStep("checks", f"query sums, {name}", check, 1.0)


def timings() -> Iterator[SubStep]:
    yield SubStep("prefill", "query sums", time_sums, 4.0)
    flops = 2.0 * HEADS * LENGTH**2 * HEAD_DIM
    for block in (128, 64):
        run = functools.partial(time_triangle, block=block)
        yield SubStep("prefill", f"triangle, blocks of {block}", run, 4.0, 6 * flops)
