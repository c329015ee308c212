"""Reference implementation: dense attention under the plan's mask, in any dtype up to fp64. Slow."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.kernels.linear.features import features
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.visibility import pair_mask


def block_sparse_reference(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    scale: float | None = None,
    combine: str = "none",
) -> tuple[Float[Tensor, "b h_q l_q d_v"], Float[Tensor, "b h_q l_q"]]:
    """Return `o` and `lse` by README.md, equations 1 (`none`) and 2 (`shared_softmax`)."""
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
        # The log of an empty block is -inf already. Masking it keeps NaN out of the gradients.
        empty = (sizes == 0)[:, None, None]
        tail = tail.masked_fill(~_unread(plan) | empty, -math.inf)
        logits, values = torch.cat([logits, tail], -1), torch.cat([v, centroid_v], -2)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return weights @ values, lse


def linear_reference(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    feature_map: str,
    linear_scope: str,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return `o_l` by README.md, equation 3; 0 in rows whose denominator is 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    pairs = pair_mask(plan, plan.linear_blocks(linear_scope))
    weights = (features(q, feature_map) @ features(k, feature_map).mT).masked_fill(~pairs, 0.0)
    total = weights.sum(-1, keepdim=True)
    if linear_scope == "all":
        total = total + 1e-5
    return (weights @ v) / torch.where(total > 0, total, torch.ones_like(total))


def sparse_linear_reference(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    combine: str,
    feature_map: str = "softmax",
    linear_scope: str = "complement",
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return `o` by README.md, for every `combine`."""
    if combine in ("none", "shared_softmax"):
        return block_sparse_reference(q, k, v, plan, scale=scale, combine=combine)[0]
    o_s, _ = block_sparse_reference(q, k, v, plan, scale=scale)
    o_l = linear_reference(q, k, v, plan, feature_map=feature_map, linear_scope=linear_scope)
    if combine == "proj":
        assert proj_weight is not None
        return o_s + torch.nn.functional.linear(o_l, proj_weight, proj_bias)
    assert alpha is not None
    row = torch.arange(plan.q_len, device=q.device)
    if plan.q_order is not None:
        row = plan.q_order.argsort(-1)  # [Hq|1, Lq]
    alpha = alpha[..., None] if alpha.ndim == 1 else alpha  # [Hq, 1] or [B|1, Hq, T_q]
    if alpha.ndim == 3:
        block = (row // plan.block_q).expand(*alpha.shape[:2], -1)
        alpha = alpha.gather(-1, block)
    alpha = alpha[..., None].to(q.dtype)
    empty = ~pair_mask(plan, plan.linear_blocks(linear_scope)).any(-1, keepdim=True)
    alpha = torch.where(empty, torch.ones_like(alpha), alpha)
    return alpha * o_s + (1 - alpha) * o_l


def _unread(plan: SparsePlan) -> Tensor:
    """Return the mask of blocks that each query does not read, `[B|1, Hq|1, Lq, T_k]`, queries in their own order."""
    row = torch.arange(plan.q_len, device=plan.device)
    unread = ~plan.to_block_mask()[..., row // plan.block_q, :]
    valid = row % plan.block_q < plan.q_sizes()[row // plan.block_q]
    unread = unread & valid[:, None]
    if plan.q_order is None:
        return unread
    unread = unread.expand(-1, max(unread.shape[1], len(plan.q_order)), -1, -1)
    return unread.gather(2, plan.q_order.argsort(-1)[None, :, :, None].expand(*unread.shape))
