"""Every launch that differs in code, on tensors without memory: what `make kernel-table` compiles."""

import functools

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import triton_backend
from dit_accel.kernels.block_sparse.forward import forward_kernel
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.router.pool import pool_launch

LENGTH = 16384
HEADS = 8


def catalogue(target: Target, head_dim: int, dtype: torch.dtype) -> dict[str, Launch]:
    """Launches by `kernel/mode`, blocks of 64 if not said otherwise, for one chip, head_dim and dtype."""
    modes = {
        "plain": _launches(target, head_dim, dtype),
        "causal": _launches(target, head_dim, dtype, causal=True),
        "columns": _launches(target, head_dim, dtype, causal=True, columns=True),
        "shared_softmax": _launches(target, head_dim, dtype, shared_softmax=True),
        "linear all": _launches(target, head_dim, dtype, linear_scope="all"),
        "linear subtracted": _launches(target, head_dim, dtype, linear_scope="complement"),
        "linear summed": _launches(target, head_dim, dtype, linear_scope="complement", read=0.6),
        "split rows": _launches(target, head_dim, dtype, read=0.5, long_rows=True),
    }
    # Tiles of more than 64 queries, which only the forward kernel has.
    wide = {
        "plain": _launches(target, head_dim, dtype, block_q=128),
        "causal": _launches(target, head_dim, dtype, block_q=128, causal=True),
        "shared_softmax": _launches(target, head_dim, dtype, block_q=128, shared_softmax=True),
        "linear all": _launches(target, head_dim, dtype, block_q=128, linear_scope="all"),
    }
    modes |= {
        f"{mode}, 128 rows": [x for x in launches if x.kernel is forward_kernel]
        for mode, launches in wide.items()
    }
    found: dict[str, Launch] = {}
    seen = set()
    for mode, launches in modes.items():
        for launch in launches:
            name = launch.kernel.__name__.removesuffix("_kernel")
            given = frozenset(n for n, x in launch.arguments.items() if x is not None)
            what = (name, tuple(launch.constants.items()), given)
            if what not in seen:
                seen.add(what)
                split = launch.constants.get("SPLIT")
                label = f"{mode} {split}" if split else mode
                found.setdefault(f"{name}/{label}", launch)
    q = _meta(head_dim, dtype)
    pooled = _meta(head_dim, torch.float32)[:, :, : LENGTH // 64]
    found["pool/router"] = pool_launch(q, pooled, None, 64)
    found["pool/spread"] = pool_launch(q, pooled, None, 64, torch.empty_like(pooled))
    return found


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
    block_q: int = 64,
    read: float = 0.05,
    long_rows: bool = False,
) -> list[Launch]:
    """What a forward and a backward call would launch, in order."""
    integers = functools.partial(torch.empty, dtype=torch.int32, device="meta")
    q, k, v = (_meta(head_dim, dtype) for _ in range(3))
    n = LENGTH // 64
    plan = SparsePlan.from_block_mask(
        torch.empty(1, HEADS, LENGTH // block_q, n, dtype=torch.bool, device="meta"),
        block_q=block_q,
        block_k=64,
        q_len=LENGTH,
        kv_len=LENGTH,
        causal=causal,
        columns=integers(1, HEADS, 512) if columns else None,
        long_rows=integers(2) if long_rows else None,
        most=int(read * n),
    )
    linear = None if linear_scope is None else Linear("softmax", linear_scope)
    launches: list[Launch] = []
    options = {
        "scale": head_dim**-0.5,
        "shared_softmax": shared_softmax,
        "linear": linear,
        "target": target,
        "run": launches.append,
    }
    o, lse, o_l, norm = triton_backend.forward(q, k, v, plan, want_lse=True, **options)
    grad_o_l = None if linear is None else o_l
    triton_backend.backward(o, lse, grad_o_l, q, k, v, plan, o, lse, o_l, norm, **options)
    return launches
