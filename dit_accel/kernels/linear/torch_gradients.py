"""Gradients of the linear branch in plain torch (block_sparse/README.md, equation 5)."""

import torch
from torch import Tensor

from dit_accel.kernels.linear.features import features_backward
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.linear.token_blocks import Scratch, TokenBlocks
from dit_accel.kernels.linear.torch_branch import (
    State,
    blocks_to_sum,
    groups,
    key_states,
    row_states,
    weights_of,
)
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.row_order import in_block_order, in_query_order


def backward(
    grad_o_l: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    o_l: Tensor,
    norm: Tensor,
    linear: Linear,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through the linear branch (README.md, equation 5)."""
    grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad_o_l, q, o_l, norm = (in_block_order(x, plan) for x in (grad_o_l, q, o_l, norm))
    add_gradients_(grads, grad_o_l, q, k, v, plan, o_l, norm, linear)
    return in_query_order(grads[0], plan), *grads[1:]


def add_gradients_(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_o_l: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    o_l: Tensor,
    norm: Tensor,
    linear: Linear,
) -> None:
    """Add the gradients of q, k and v through the linear branch to `grads`, in place. Rows are in the order of the blocks."""
    dtype = norm.dtype
    grad_q, grad_k, grad_v = grads
    rows, keys = TokenBlocks.of_queries(plan, dtype), TokenBlocks.of_keys(plan, dtype)
    summed, scratch = blocks_to_sum(plan, linear), Scratch()
    for b, h_kv, heads in groups(q, k):
        per_block = key_states(k[b, h_kv], v[b, h_kv], keys, b, linear, scratch)
        sums: State | None = None
        for h in heads:
            weights = weights_of(summed, b, h, dtype)
            for some, state in row_states(per_block, weights, None, scratch):
                part = _query_side(
                    grad_o_l[b, h], q[b, h], o_l[b, h], norm[b, h], grad_q[b, h],
                    rows, some, state, linear, scratch,
                )  # fmt: skip
                if weights is not None:
                    to_keys = weights[some].T
                    part = State(
                        (to_keys @ part.kv.flatten(1)).unflatten(1, part.kv.shape[1:]),
                        to_keys @ part.z,
                    )
                sums = part if sums is None else State(sums.kv.add_(part.kv), sums.z.add_(part.z))
        assert sums is not None
        _key_side(
            k[b, h_kv], v[b, h_kv], grad_k[b, h_kv], grad_v[b, h_kv], keys, b, sums, linear, scratch
        )


def _query_side(
    grad_o_l: Tensor,
    q: Tensor,
    o_l: Tensor,
    norm: Tensor,
    grad_q: Tensor,
    rows: TokenBlocks,
    some: slice,
    state: State,
    linear: Linear,
    scratch: Scratch,
) -> State:
    """Add to the gradient of some query blocks, and return the gradient of their `state`, of the same layout."""
    one = state.kv.ndim == 2
    z = torch.zeros_like(state.z)
    kv = torch.zeros_like(state.kv) if one else scratch.take("row sums", state.kv, *state.kv.shape)
    for blocks in rows.chunks(q.shape[-1], some):
        here = slice(blocks.start - some.start, blocks.stop - some.start)
        of_rows = state if one else State(state.kv[here], state.z[here])
        phi = rows.features(q, blocks, linear.feature_map, scratch)
        g, o = rows.load(grad_o_l, blocks), rows.load(o_l, blocks)
        # Gradients of numerator and denominator of each row.
        grad_sums = g * rows.load(norm[:, None], blocks)
        grad_total = (grad_sums * o).sum(-1).neg_()
        grad_phi = grad_sums @ of_rows.kv.mT
        grad_phi.addcmul_(grad_total[..., None], of_rows.z[..., None, :])
        grad = features_backward(rows.load(q, blocks), phi, grad_phi, linear.feature_map)
        rows.add(grad_q, blocks, grad)
        if one:
            flat = phi.flatten(0, 1).T
            kv.addmm_(flat, grad_sums.flatten(0, 1))
            z.addmv_(flat, grad_total.flatten())
        else:
            torch.bmm(phi.mT, grad_sums, out=kv[here])
            z[here] = (phi * grad_total[..., None]).sum(1)
    return State(kv, z)


def _key_side(
    k: Tensor,
    v: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    keys: TokenBlocks,
    batch: int,
    sums: State,
    linear: Linear,
    scratch: Scratch,
) -> None:
    """Add to the gradients of one key head, from the gradients of the states of its rows."""
    for blocks in keys.chunks(k.shape[-1]):
        kv, z = (x if sums.z.ndim == 1 else x[blocks] for x in sums)
        phi = keys.features(k, blocks, linear.feature_map, scratch, batch)
        grad_phi = (keys.load(v, blocks, batch) @ kv.mT).add_(z[..., None, :])
        padding = keys.padding_of(blocks, batch)
        if padding is not None:  # padding gets no gradient
            grad_phi.masked_fill_(padding[..., None], 0.0)
        keys.add(grad_v, blocks, phi @ kv)
        loaded = keys.load(k, blocks, batch)
        keys.add(grad_k, blocks, features_backward(loaded, phi, grad_phi, linear.feature_map))
