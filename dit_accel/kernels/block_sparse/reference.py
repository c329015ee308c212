"""The definition: dense attention under the plan's mask. Short and slow; any dtype up to fp64."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.kernels.plan import SparsePlan


def block_sparse_reference(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    scale: float | None = None,
    combine: str = "none",
) -> tuple[Float[Tensor, "b h_q l_q d_v"], Float[Tensor, "b h_q l_q"]]:
    """`o` and `lse` of README.md, equations 1 (`none`) and 2 (`shared_softmax`)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = plan.to_dense_mask()
    logits = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    values = v
    if combine == "shared_softmax":
        n_k, block = plan.num_k_blocks, plan.block_k
        sizes = plan.k_sizes()
        token = torch.arange(plan.kv_len, device=q.device)
        member = (token // block == torch.arange(n_k, device=q.device)[:, None]).expand(
            len(sizes), -1, -1
        )
        member = member & (token % block < sizes[..., None])  # [B|1, T_k, Lk]
        mean = (member.to(q.dtype) / sizes[..., None].clamp(min=1))[:, None]
        centroid_k, centroid_v = mean @ k, mean @ v
        tail = q @ centroid_k.mT * scale + sizes.to(q.dtype).log()[:, None, None]
        q_block = torch.arange(plan.q_len, device=q.device)
        q_valid = (q_block % plan.block_q < plan.q_sizes()[q_block // plan.block_q])[:, None]
        read = plan.to_block_mask()[..., q_block // plan.block_q, :]
        # An empty block is -inf by its log already; masked, it passes no NaN to the gradients.
        empty = (sizes == 0)[:, None, None]
        tail = tail.masked_fill(read | ~q_valid | empty, -math.inf)
        logits, values = torch.cat([logits, tail], -1), torch.cat([v, centroid_v], -2)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return weights @ values, lse
