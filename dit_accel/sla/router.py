"""`LearnedRouter`: ranks key blocks by projected block means, and learns which blocks are worth reading."""

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
"""Query blocks of a call that the router learns from, at least."""


class LearnedRouter(nn.Module):
    """Weights of a learned ranking of key blocks: one matrix for each head, the identity at first.

    The score of a block is `scale * (mean(Q) W) . mean(K)` plus the spread term of `block_scores`. W stands for a
    projection of the queries times one of the keys, because only their product ranks. The weights are asked for by
    a call, so that offloading hooks bring them.
    """

    step: Tensor
    """Number of the step, which selects the query blocks that teach."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim, dtype=torch.float32).repeat(heads, 1, 1))
        self.every_row = True
        """Whether every query block teaches in every call; else some do."""
        # A tensor, because torch.compile would make a number a constant.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self) -> Float[Tensor, "h d d"]:
        return self.weight

    def rows(self, blocks: int, share: float) -> Int[Tensor, " n"]:
        """Return the query blocks that teach in this call.

        Args:
            blocks: number of query blocks.
            share: share of them that teaches if not all do, but at least `LEAST_ROWS` of them.
        """
        device = self.step.device
        if self.every_row:
            return torch.arange(blocks, device=device)
        n = min(blocks, max(LEAST_ROWS, math.ceil(share * blocks)))
        # Evenly spaced; each step takes the next ones, until all had their turn.
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
    """Return `o` such that its gradient reaches the router too, through a straight-through soft top-k.

    Args:
        o: output of image queries.
        router: the router that ranked the blocks.
        projection: its weights, on the device of q.
        scores: scores of the image blocks.
        plan: plan that the scores gave.
        q: image queries.
        k, v: image keys and values.
        scale: factor of the dot products. Default: `D ** -0.5`.
        mode: arguments of `sparse_linear_attention` that combine the branches.
        text: keys and values of the text. Default: none.
        text_lengths: number of these of each row that count. Default: all do.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = scores.shape[3]
    # About as many pairs as the plan reads, so that learning costs as much as attention.
    share = 1.0 if plan.row_bound is None else plan.row_bound / plan.num_k_blocks
    rows = router.rows(plan.num_q_blocks, share).to(q.device)
    read = plan.to_block_mask()[:, :, rows, :blocks]
    pooled_q, pooled_k = pool_blocks(q, plan.block_q)[:, :, rows], pool_blocks(k, plan.block_k)
    with no_autocast(q):
        grouped = project(pooled_q * scale, projection).unflatten(1, (k.shape[1], -1))
        products = (grouped @ pooled_k[:, :, None].mT).flatten(1, 2)
    # The values of the scores that ranked, and the gradient of what the projection adds to them.
    ranked = scores[:, :, rows] + (products - products.detach())
    count = read.sum(-1, keepdim=True)
    weights = soft_topk(ranked, count, temperature=TEMPERATURE)
    combine, scope = mode["combine"], mode.get("linear_scope")
    linear_set = None
    if scope not in (None, "all"):
        linear_set = plan.linear_blocks(scope)[:, :, rows, :blocks]
    return credited(
        o,
        # Fewer rows stand for all.
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
