"""`LearnedRouter`: learned ranking of key blocks by projected block means."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dit_accel.kernels import SparsePlan
from dit_accel.kernels.precision import no_autocast
from dit_accel.kernels.router import pool_blocks, soft_topk
from dit_accel.kernels.router.credit import credited
from dit_accel.kernels.router.scores import project

TEMPERATURE = 0.1
"""Temperature of the soft top-k, in units of the logits; README.md has the measurements."""
LEAST_ROWS = 8
"""Smallest number of query blocks that the router learns from in a call."""


class LearnedRouter(nn.Module):
    """Weights of a learned ranking of key blocks: one matrix W for each head, the identity at first.

    The score of a block is `scale * (mean(Q) W) . mean(K)` plus the spread term of `block_scores`. W is the product of a
    projection of queries and a projection of keys, because the ranking depends only on the product. `forward` returns
    the weights, so that offloading hooks load them.
    """

    step: Tensor
    """Number of the training step, which selects the query blocks to learn from."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim, dtype=torch.float32).repeat(heads, 1, 1))
        self.every_row = True
        """True if the router learns from every query block in every call, False if from some of them."""
        # A tensor, because torch.compile specialises on Python ints.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self) -> Float[Tensor, "h d d"]:
        return self.weight

    def rows(self, blocks: int, share: float) -> Int[Tensor, " n"]:
        """Return the query blocks that the router learns from in this call.

        Args:
            blocks: number of query blocks.
            share: share of the query blocks if `every_row` is False; at least `LEAST_ROWS` blocks are used.
        """
        device = self.step.device
        if self.every_row:
            return torch.arange(blocks, device=device)
        n = min(blocks, max(LEAST_ROWS, math.ceil(share * blocks)))
        # Evenly spaced. Each step uses the next ones, so that all blocks are used in turn.
        return (torch.arange(n, device=device) * blocks // n + self.step) % blocks


def taught(
    o: Float[Tensor, "b h_q l_q d_v"],
    router: LearnedRouter,
    projection: Float[Tensor, "h_q d d"],
    scores: Float[Tensor, "b h_q t_q t_k"],
    plan: SparsePlan,
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    *,
    scale: float | None,
    mode: dict[str, Any],
    text: tuple[Tensor, Tensor] | None = None,
    text_lengths: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return `o` with a gradient that also reaches the router, through a straight-through soft top-k.

    Args:
        o: output of image queries.
        router: router that ranked the blocks.
        projection: weights of the router, on the device of q.
        scores: scores of the image blocks.
        plan: plan that was made from the scores.
        q: image queries.
        k, v: image keys and values.
        scale: factor of the dot products. Default: `D ** -0.5`.
        mode: arguments of `sparse_linear_attention` that combine the branches.
        text: keys and values of the text. Default: none.
        text_lengths: number of text tokens of each row without padding. Default: no padding.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = scores.shape[3]
    # About as many pairs as the plan reads, so that learning costs about as much as attention.
    share = 1.0 if plan.row_bound is None else plan.row_bound / plan.num_k_blocks
    rows = router.rows(plan.num_q_blocks, share).to(q.device)
    read = plan.to_block_mask()[:, :, rows, :blocks]
    pooled_q, pooled_k = pool_blocks(q, plan.block_q)[:, :, rows], pool_blocks(k, plan.block_k)
    with no_autocast(q):
        grouped = project(pooled_q * scale, projection).unflatten(1, (k.shape[1], -1))
        products = (grouped @ pooled_k[:, :, None].mT).flatten(1, 2)
    # The values are the scores that ranked. The gradient is that of the projected products.
    ranked = scores[:, :, rows] + (products - products.detach())
    count = read.sum(-1, keepdim=True)
    weights = soft_topk(ranked, count, temperature=TEMPERATURE)
    combine, scope = mode["combine"], mode.get("linear_scope")
    linear_set = None
    if scope not in (None, "all"):
        linear_set = plan.linear_blocks(scope)[:, :, rows, :blocks]
    return credited(
        o,
        # Scaled, because the rows represent all query blocks.
        weights * (scores.shape[2] / len(rows)),
        q,
        k,
        v,
        rows=rows,
        read=read,
        block_q=plan.block_q,
        block_k=plan.block_k,
        scale=scale,
        text=text,
        text_lengths=text_lengths,
        shared_softmax=combine == "shared_softmax",
        linear_set=linear_set,
        feature_map=mode.get("feature_map", "softmax"),
        proj_weight=mode.get("proj_weight"),
        alpha=mode.get("alpha"),
    )
