"""Problems and modes of the benchmark of attention (kernels/bench_attention.py)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import (
    SparsePlan,
    block_scores,
    block_sparse_attention,
    sparse_linear_attention,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES: dict[str, dict[str, str]] = {
    "none": {"combine": "none"},
    "shared_softmax": {"combine": "shared_softmax"},
    **{s: {"combine": "proj", "linear_scope": s} for s in ("all", "complement", "marginal")},
}
SKIP = 0.1
"""Fraction of the blocks that the scope "marginal" skips."""


@dataclass(frozen=True)
class Case:
    """Sizes of one attention problem."""

    name: str
    heads: int
    length: int
    head_dim: int
    block_q: int
    block_k: int
    topk: float
    kv_heads: int | None = None
    backward: bool = False
    every_mode: bool = True
    """Time every mode and every dense attention. If False: only `combine="none"` and the default backend of SDPA."""


def cases(device: str) -> Iterator[Case]:
    """Yield the problems for a CPU or a GPU."""
    if device == "cpu":
        head = Case("headline", 12, 8192, 128, 128, 128, 0.05)
        yield head
        yield replace(head, name="headline, forward + backward", backward=True)
        for topk in (0.1, 0.25, 0.5):
            yield replace(head, name="density", topk=topk, every_mode=False)
        yield replace(head, name="blocks of 64", block_q=64, block_k=64, topk=0.1, every_mode=False)
        for length in (2048, 4096, 16384):
            yield replace(head, name="length", heads=4, length=length, every_mode=False)
        yield Case("ragged", 4, 4001, 64, 64, 64, 0.1, every_mode=False)
        yield Case("grouped queries", 8, 4096, 64, 64, 64, 0.1, kv_heads=2, every_mode=False)
        return
    wan = Case("Wan2.1 1.3B 480p", 12, 32760, 128, 128, 64, 0.05)
    yield wan
    yield replace(wan, name="Wan2.1 1.3B 480p, forward + backward", backward=True)
    yield replace(wan, name="Wan2.1 14B 720p", heads=40, length=75600)
    for topk in (0.02, 0.1, 0.2, 0.4):
        yield replace(wan, name="density", topk=topk)
    for length in (2048, 4096, 8192, 16384, 65536, 131072):
        yield replace(wan, name="length", length=length, every_mode=False)
    yield Case("Lumina 2", 24, 4608, 96, 64, 64, 0.1, kv_heads=8)
    yield Case("head_dim 72", 16, 4608, 72, 64, 64, 0.1)
    yield Case("head_dim 64", 24, 17776, 64, 128, 64, 0.05)


def inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return random q, k, v `[1, H, L, D]`."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [
        torch.randn(
            1, heads, case.length, case.head_dim, generator=generator, device=device, dtype=dtype
        )
        for heads in (case.heads, case.kv_heads or case.heads, case.kv_heads or case.heads)
    ]
    return [x.requires_grad_(case.backward) for x in tensors]


def make_plan(case: Case, q: Tensor, k: Tensor, skip: float = 0.0) -> SparsePlan:
    """Return the plan of a problem, from the scores of its blocks."""
    size: dict[str, Any] = {"block_q": case.block_q, "block_k": case.block_k}
    scores = block_scores(q.detach(), k.detach(), **size)
    return SparsePlan.from_scores(
        scores, topk=case.topk, skip=skip, q_len=case.length, kv_len=case.length, **size
    )


def weight(case: Case, like: Tensor) -> Tensor:
    """Return a random projection weight in the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(case.head_dim, case.head_dim, generator=generator) / case.head_dim**0.5
    return matrix.to(like)


def attend(mode: str, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, proj: Tensor) -> Tensor:
    """Return sparse attention in one of `MODES`."""
    if mode == "none":
        o = block_sparse_attention(q, k, v, plan)
        assert isinstance(o, Tensor)  # a pair only with return_lse
        return o
    options: dict[str, Any] = dict(MODES[mode])
    if options["combine"] == "proj":
        options["proj_weight"] = proj
    return sparse_linear_attention(q, k, v, plan, **options)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return dense attention with the default backend of SDPA."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
