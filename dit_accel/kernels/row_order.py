"""Permutation of rows between the order of the queries and the order of a plan's query blocks."""

import torch
from torch import Tensor

from dit_accel.kernels.plan import SparsePlan


def in_block_order(x: Tensor, plan: SparsePlan) -> Tensor:
    """Return rows `[B, H, Lq, ...]` in the order of the query blocks."""
    return x if plan.q_order is None else x.gather(2, _index(x, plan))


def in_query_order(x: Tensor, plan: SparsePlan) -> Tensor:
    """Return rows `[B, H, Lq, ...]` in the order of the queries: the inverse of `in_block_order`."""
    if plan.q_order is None:
        return x
    return torch.zeros_like(x).scatter_(2, _index(x, plan), x)


def _index(x: Tensor, plan: SparsePlan) -> Tensor:
    assert plan.q_order is not None
    order = plan.q_order.long()[None]
    return (order if x.ndim == 3 else order[..., None]).expand(x.shape)
