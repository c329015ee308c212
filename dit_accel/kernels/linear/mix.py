"""Combination of the outputs of the linear and the exact branch, in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.precision import no_autocast


class Mix(NamedTuple):
    """Weights of `combine="proj"` (`proj_weight`, `proj_bias`) or `combine="alpha"` (`alpha`)."""

    proj_weight: Tensor | None = None
    """`[Dv, Dv]`."""
    proj_bias: Tensor | None = None
    """`[Dv]`."""
    alpha: Tensor | None = None
    """`[Hq]` or `[B|1, Hq, T_q]`."""


def mixed(o: Tensor, o_l: Tensor, mix: Mix, plan: SparsePlan, linear_scope: str) -> Tensor:
    """Return o + o_l W^T + b, or alpha o + (1 - alpha) o_l; `[B, Hq, Lq, Dv]`. Differentiable."""
    if mix.alpha is not None:
        return torch.lerp(o_l, o, _alpha_per_query(mix.alpha, plan, linear_scope).to(o.dtype))
    assert mix.proj_weight is not None
    with no_autocast(o):
        weight = mix.proj_weight.to(o.dtype)
        flat = torch.addmm(o.flatten(0, 2), o_l.flatten(0, 2), weight.T)
    if mix.proj_bias is not None:
        flat.add_(mix.proj_bias)  # adds and converts in one operation
    return flat.view_as(o)


def alpha_per_block(alpha: Tensor, plan: SparsePlan, linear_scope: str) -> Tensor:
    """Return alpha of each query block, `[B|1, Hq, T_q]`; 1 where the linear set is empty."""
    valid = plan.k_sizes()[:, None, None, :] > 0
    empty = ~(plan.linear_blocks(linear_scope) & valid).any(-1)
    per_block = alpha[None, :, None] if alpha.ndim == 1 else alpha
    return torch.where(empty, torch.ones_like(per_block), per_block)


def _alpha_per_query(alpha: Tensor, plan: SparsePlan, linear_scope: str) -> Tensor:
    """Return alpha of each query, `[B|1, Hq, Lq, 1]`; 1 where the linear set is empty."""
    per_block = alpha_per_block(alpha, plan, linear_scope)
    row = torch.arange(plan.q_len, device=alpha.device)
    if plan.q_order is None:
        return per_block[..., row // plan.block_q, None]
    block = plan.q_order.argsort(-1) // plan.block_q  # block of each query
    return per_block.gather(-1, block.expand(*per_block.shape[:2], -1))[..., None]
