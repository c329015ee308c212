"""Catalogue of all launches that compile to different code, on meta tensors. `make kernel-table` compiles them."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import triton_backend
from dit_accel.kernels.block_sparse.backward_rows import rows_kernel
from dit_accel.kernels.block_sparse.forward import forward_kernel
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.geometry import Geometry
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.linear.mix import Mix
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.linear.state_kernel import totals_kernel
from dit_accel.kernels.lists import Lists
from dit_accel.kernels.lut_attention.kernel import lut_launch
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.query_sums.sums_kernel import sums_launches
from dit_accel.kernels.router.criteria import Criteria
from dit_accel.kernels.router.pool import pool_launch
from dit_accel.kernels.router.scores_kernel import scores_launch
from dit_accel.kernels.router.select_kernel import select_launch

BY_ROWS = (forward_kernel, rows_kernel, totals_kernel)
LENGTH = 16384
HEADS = 8


def catalogue(target: Target, head_dim: int, dtype: torch.dtype) -> dict[str, Launch]:
    """Return the launches for a chip, a head_dim and a dtype, by "kernel/mode". Blocks are 64 unless the mode says 128."""
    make = functools.partial(_launches, target, head_dim, dtype)
    modes = {
        "plain": make(),
        "causal": make(causal=True),
        "columns": make(causal=True, columns=True),
        "shared_softmax": make(shared_softmax=True),
        "linear all": make(linear_scope="all"),
        "linear complement": make(linear_scope="complement"),
        "linear by row": make(linear_scope="complement", bounded=False),
        "split rows": make(read=0.5, long_rows=True, causal=True),
        # Pipelined loops load the block sizes along with the block indices.
        "ragged": make(ragged=True, linear_scope="complement", bounded=False),
    }
    # Tiles of more than 64 queries, and modes that exist at inference only.
    wide = {
        "plain": make(block_q=128),
        "causal": make(block_q=128, causal=True),
        "columns": make(block_q=128, causal=True, columns=True),
        "shared_softmax": make(block_q=128, shared_softmax=True),
        "linear all": make(block_q=128, linear_scope="all"),
        "linear complement": make(block_q=128, linear_scope="complement"),
        "linear by row": make(block_q=128, linear_scope="complement", bounded=False),
        "proj all": make(block_q=128, linear_scope="all", combine="proj"),
        "proj complement": make(block_q=128, linear_scope="complement", combine="proj"),
        "alpha complement": make(block_q=128, linear_scope="complement", combine="alpha"),
    }
    modes |= {
        f"{mode}, 128 rows": [x for x in launches if x.kernel in BY_ROWS]
        for mode, launches in wide.items()
    }
    # Query heads that share keys and lists, on chips whose tile holds two or more query blocks.
    packed = {
        "plain": make(group=4),
        "causal": make(group=4, causal=True),
        "columns": make(group=4, causal=True, columns=True),
        "shared_softmax": make(group=4, shared_softmax=True),
        "split rows": make(group=4, read=0.5, long_rows=True, causal=True),
    }
    modes |= {f"{mode}, packed heads": launches for mode, launches in packed.items()}
    found: dict[str, Launch] = {}
    seen = set()
    for mode, launches in modes.items():
        for launch in launches:
            name = launch.kernel.__name__.removesuffix("_kernel")
            given = frozenset(n for n, x in launch.arguments.items() if x is not None)
            what = (name, tuple(launch.constants.items()), given)
            if what not in seen:
                seen.add(what)
                found.setdefault(f"{name}/{mode}", launch)
    q = _meta(head_dim, dtype)
    pooled = _meta(head_dim, torch.float32)[:, :, : LENGTH // 64]
    found["pool/router"] = pool_launch(q, pooled, None, 64)
    found["pool/spread"] = pool_launch(q, pooled, None, 64, pooled)
    scores = _meta(LENGTH // 64, torch.float32)[:, :, : LENGTH // 64]
    for name, squares in (("router", None), ("spread", (pooled, pooled))):
        found[f"scores/{name}"] = scores_launch(
            pooled, pooled, squares, None, scores, scale=0.1, block_k=64
        )
    columns = pooled.new_empty(1, HEADS, LENGTH)
    last = range(LENGTH - 64, LENGTH)
    launches = sums_launches(q, q, last, columns, columns, scale=0.1, target=target)
    for launch in launches:
        found[f"{launch.kernel.__name__.removesuffix('_kernel')}/last queries"] = launch
    read = torch.empty(1, HEADS, *[LENGTH // 64] * 2, dtype=torch.bool, device="meta")
    launches = sums_launches(q, q, last, columns, None, scale=0.1, read=read, target=target)
    found["column_sums/unread"] = launches[-1]
    found["select/topk"] = _select(scores, Criteria(best=13))
    found["select/top_p"] = _select(scores, Criteria(top_p=0.9, skip=25, diagonal=1), causal=True)
    # A GQA group of 4 queries; codes of one byte for two channels.
    numbers = functools.partial(torch.empty, device="meta")
    codes = numbers(1, HEADS, LENGTH, head_dim // 2, dtype=torch.uint8)
    table, books = numbers(1, HEADS, 4, head_dim // 2, 256), numbers(1, head_dim // 2, 256, 2)
    real = numbers(1, 1, LENGTH, dtype=torch.bool)
    found["lut/codes"] = lut_launch(table, codes, codes, books)[0]
    found["lut/padded"] = lut_launch(table, codes, codes, books, real)[0]
    planes, places = numbers(*table.shape, 2), numbers(1, 1, LENGTH, dtype=torch.int32)
    turns = numbers(head_dim // 2, dtype=torch.int32)
    found["lut/rotated"] = lut_launch(planes, codes, codes, books, None, places, turns)[0]
    return found


def _select(scores: Tensor, criteria: Criteria, **rules: Any) -> Launch:
    """Return the launch that writes the lists of a plan. It also fills a tally if the rules allow one."""
    integers = functools.partial(torch.empty, dtype=torch.int32, device="meta")
    geometry = Geometry.of("meta", block_q=64, block_k=64, q_len=LENGTH, kv_len=LENGTH, **rules)
    partial, full, skipped = (
        Lists(integers(scores.shape[:3]), integers(*scores.shape[:3], width))
        for width in (1, 13, 26)
    )
    tally = None if rules else torch.empty(3, dtype=torch.int64, device="meta")
    return select_launch(
        scores,
        geometry,
        criteria,
        partial,
        full,
        None if criteria.skip is None else skipped,
        tally=tally,
    )


def _meta(width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, HEADS, LENGTH, width, dtype=dtype, device="meta")


def _launches(
    target: Target,
    head_dim: int,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    columns: bool = False,
    shared_softmax: bool = False,
    linear_scope: str | None = None,
    combine: str | None = None,
    bounded: bool = True,
    ragged: bool = False,
    block_q: int = 64,
    read: float = 0.05,
    long_rows: bool = False,
    group: int = 1,
) -> list[Launch]:
    """Return the launches of a forward and a backward call, in order.

    With `combine` or `group` > 1, return those of a call at inference. `group` query heads share keys and lists.
    """
    integers = functools.partial(torch.empty, dtype=torch.int32, device="meta")
    heads = HEADS // group
    q, k, v = _meta(head_dim, dtype), *(_meta(head_dim, dtype)[:, :heads] for _ in range(2))
    n = LENGTH // 64
    plan = SparsePlan.from_block_mask(
        torch.empty(1, heads, LENGTH // block_q, n, dtype=torch.bool, device="meta"),
        block_q=block_q,
        block_k=64,
        q_len=LENGTH,
        kv_len=LENGTH,
        causal=causal,
        columns=integers(1, heads, 512) if columns else None,
        long_rows=integers(2) if long_rows else None,
        q_block_sizes=integers(LENGTH // block_q) if ragged else None,
        k_block_sizes=integers(n) if ragged else None,
        most=int(read * n),
    )
    plan = dataclasses.replace(plan, row_bound=int(read * n) if bounded else None)
    linear = None if linear_scope is None else Linear("softmax", linear_scope)
    launches: list[Launch] = []
    options = {
        "scale": head_dim**-0.5,
        "shared_softmax": shared_softmax,
        "linear": linear,
        "target": target,
        "run": launches.append,
    }
    if combine is not None:
        numbers = functools.partial(torch.empty, device="meta")
        alpha = Mix(alpha=numbers(HEADS))
        mix = alpha if combine == "alpha" else Mix(numbers(head_dim, head_dim), numbers(head_dim))
        triton_backend.forward(q, k, v, plan, want_lse=False, mix=mix, **options)
        return launches
    o, lse, o_l, norm = triton_backend.forward(q, k, v, plan, want_lse=True, **options)
    if group > 1:
        return launches
    grad_o_l = None if linear is None else o_l
    triton_backend.backward(o, lse, grad_o_l, q, k, v, plan, o, lse, o_l, norm, **options)
    return launches
