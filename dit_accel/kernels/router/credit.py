"""`credited`: straight-through gradient of the selection of key blocks.

README.md has the equations.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.kernels.linear.features import features
from dit_accel.kernels.operators import operator
from dit_accel.kernels.precision import no_autocast, wide
from dit_accel.kernels.router.pooling import pool_blocks

# Bytes of one [heads, rows, keys] tensor. On a CPU it should fit in the cache; elsewhere few launches matter more.
CHUNK_BYTES = {"cpu": 2**22}
DEVICE_CHUNK_BYTES = 2**26
# Limit of exponents relative to the largest logit that is read. The exact size of larger ones does not matter.
MOST_EXPONENT = 60.0


def credited(
    o: Float[Tensor, "b h_q l_q d_v"],
    weights: Float[Tensor, "b h_q n t_k"],
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    *,
    rows: Int[Tensor, " n"],
    read: Bool[Tensor, "b h_q n t_k"],
    block_q: int,
    block_k: int,
    scale: float,
    text: tuple[Tensor, Tensor] | None = None,
    text_lengths: Int[Tensor, " b"] | None = None,
    shared_softmax: bool = False,
    linear_set: Bool[Tensor, "b h_q n t_k"] | None = None,
    feature_map: str = "softmax",
    proj_weight: Float[Tensor, "d_v d_v"] | None = None,
    alpha: Float[Tensor, " h_q"] | None = None,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return a copy of `o` whose gradient flows to `o` and, as a straight-through estimate, to `weights`.

    The gradient of a weight estimates the change of the loss if the query block reads the key block exactly and all
    other blocks stay the same. It costs dense attention of the query blocks `rows`. Only `o` and `weights` get a
    gradient.

    Args:
        o: output of sparse-linear attention over image tokens.
        weights: selection weights of some query blocks (from `soft_topk`). Their values are not used, only their gradient.
        q: image queries.
        k, v: image keys and values, without the text.
        rows: indices of the query blocks of `weights`.
        read: mask of the blocks that these rows read exactly.
        block_q, block_k: tokens per block.
        scale: factor of the dot products.
        text: keys and values `[B, Hkv, L, D]` that every query reads. Default: none.
        text_lengths: number of valid text tokens of each sample, `[B]`. Default: all.
        shared_softmax: unread blocks enter the softmax by their means.
        linear_set: mask of the blocks that the linear branch sums over, and no longer sums once they are read. Default:
            no linear branch, or one that reads every block.
        feature_map: feature map of the linear branch.
        proj_weight: weight of the projection, for `combine="proj"`.
        alpha: share of the exact branch, for `combine="alpha"`.
    """
    words_k, words_v = text or (k[:, :, :0], v[:, :, :0])
    return torch.ops.dit_accel.credited(
        o,
        weights,
        q,
        k,
        v,
        words_k,
        words_v,
        text_lengths,
        rows,
        read,
        linear_set,
        proj_weight,
        alpha,
        block_q,
        block_k,
        scale,
        shared_softmax,
        feature_map,
    )


@torch.library.custom_op("dit_accel::credited", mutates_args=())
def _credited(
    o: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words_k: Tensor,
    words_v: Tensor,
    text_lengths: Tensor | None,
    rows: Tensor,
    read: Tensor,
    linear_set: Tensor | None,
    proj_weight: Tensor | None,
    alpha: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    shared_softmax: bool,
    feature_map: str,
) -> Tensor:
    return o.clone(memory_format=torch.contiguous_format)


@_credited.register_fake
def _credited_fake(o: Tensor, *rest: Any) -> Tensor:
    return o.new_empty(o.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    _, _, *tensors = inputs[:13]
    ctx.save_for_backward(*tensors)
    ctx.numbers = inputs[13:]


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.dit_accel.block_credits(grad, *ctx.saved_tensors, *ctx.numbers)
    return grad, found, *[None] * 16


_credited.register_autograd(_autograd, setup_context=_setup_context)


def _empty_credits(grad: Tensor, q: Tensor, *rest: Any) -> Tensor:
    read = rest[6]
    return q.new_empty(read.shape, dtype=wide(q))


@operator("block_credits", _empty_credits)
def _block_credits(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words_k: Tensor,
    words_v: Tensor,
    text_lengths: Tensor | None,
    rows: Tensor,
    read: Tensor,
    linear_set: Tensor | None,
    proj_weight: Tensor | None,
    alpha: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    shared_softmax: bool,
    feature_map: str,
) -> Tensor:
    """Return the gradient of each weight, `[B, Hq, n, T_k]`, fp32 (fp64 for fp64)."""
    dtype = wide(q)
    group = q.shape[1] // k.shape[1]
    out = q.new_empty(read.shape, dtype=dtype)
    with torch.no_grad(), no_autocast(q):
        q_rows, grad_rows = (_rows_of(x, rows, block_q, dtype) for x in (q, grad))
        for b, h, heads, some in _chunks(q_rows, k, group):
            grad_exact = grad_linear = grad_rows[b, heads, some]
            if alpha is not None:
                share = alpha.to(dtype)[heads, None, None, None]
                grad_exact, grad_linear = share * grad_exact, (1 - share) * grad_linear
            elif proj_weight is not None:
                grad_linear = grad_linear @ proj_weight.to(dtype)
            queries, is_read = q_rows[b, heads, some], read[b, heads, some]
            keys, values, text_k, text_v = (x[b, h].to(dtype) for x in (k, v, words_k, words_v))
            hidden = None
            if text_lengths is not None:
                hidden = torch.arange(len(text_k), device=q.device) >= text_lengths[b]
            found = _exact_credits(
                queries,
                grad_exact,
                keys,
                values,
                text_k,
                text_v,
                hidden,
                is_read,
                block_k,
                scale,
                shared_softmax,
            )
            if linear_set is not None:
                in_set = linear_set[b, heads, some]
                found += _linear_credits(
                    queries, grad_linear, keys, values, is_read, in_set, block_k, feature_map
                )
            out[b, heads, some] = found
    return out


def _rows_of(x: Tensor, rows: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Return the tokens of some query blocks, `[B, H, n, block, D]`, with zeros where there is no token."""
    gap = -x.shape[2] % block
    padded = F.pad(x, (0, 0, 0, gap)) if gap else x  # F.pad by 0 would copy
    return padded.unflatten(2, (-1, block)).index_select(2, rows).to(dtype)


def _chunks(q_rows: Tensor, k: Tensor, group: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield (batch entry, key head, query heads, rows): one key head and some rows at a time."""
    batch, heads, n, block, _ = q_rows.shape
    most = CHUNK_BYTES.get(k.device.type, DEVICE_CHUNK_BYTES)
    step = max(1, most // (group * block * k.shape[2] * q_rows.itemsize))
    for b in range(batch):
        for h in range(heads // group):
            for start in range(0, n, step):
                yield b, h, slice(h * group, (h + 1) * group), slice(start, start + step)


def _by_block(x: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """Return `[..., L]` as `[..., T, block]`, padded with `fill`."""
    gap = -x.shape[-1] % block
    padded = F.pad(x, (0, gap), value=fill) if gap else x
    return padded.unflatten(-1, (-1, block))


def _exact_credits(
    q: Tensor,
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    hidden: Tensor | None,
    read: Tensor,
    block: int,
    scale: float,
    shared_softmax: bool,
) -> Tensor:
    """Return the change of grad . o if a row reads each block, summed over the queries of the row, `[h, n, T]`.

    Args:
        hidden: mask of the text tokens that no query reads; None: all are read.
    """
    logits, text_logits = q @ k.T * scale, q @ text_k.T * scale
    if hidden is not None:
        text_logits = text_logits.masked_fill(hidden, -math.inf)
    top = _by_block(logits, block, -math.inf).amax(-1)
    top = top.masked_fill(~read[:, :, None], -math.inf).amax(-1, keepdim=True)
    if text_k.shape[0]:
        top = torch.maximum(top, text_logits.amax(-1, keepdim=True))
    p = (logits - top).clamp(max=MOST_EXPONENT).exp()
    mass, value = (_by_block(x, block).sum(-1) for x in (p, p * (grad @ v.T)))
    text_p = (text_logits - top).exp()
    total = text_p.sum(-1, keepdim=True)
    gained = (text_p * (grad @ text_v.T)).sum(-1, keepdim=True)
    if shared_softmax:
        mean_k, mean_v = (pool_blocks(x[None, None], block)[0, 0] for x in (k, v))
        sizes = _by_block(torch.ones_like(k[:, 0]), block).sum(-1)
        tail = (q @ mean_k.T * scale - top).clamp(max=MOST_EXPONENT).exp() * sizes
        tail_value = tail * (grad @ mean_v.T)
        total, gained = (
            total + tail.sum(-1, keepdim=True),
            gained + tail_value.sum(-1, keepdim=True),
        )
        # Reading a block adds its tokens and removes its mean.
        mass, value = mass - tail, value - tail_value
    is_read = read[:, :, None].to(q.dtype)
    total = total + (is_read * mass).sum(-1, keepdim=True)
    now = (gained + (is_read * value).sum(-1, keepdim=True)) / total
    return ((value - mass * now) / (total + (1 - is_read) * mass)).sum(2)


def _linear_credits(
    q: Tensor,
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    linear_set: Tensor,
    block: int,
    feature_map: str,
) -> Tensor:
    """Return the change of grad . o_l if a row reads each block, which removes it from the linear set; `[h, n, T]`."""
    weight = features(q, feature_map) @ features(k, feature_map).T
    mass, value = (_by_block(x, block).sum(-1) for x in (weight, weight * (grad @ v.T)))
    in_set = linear_set[:, :, None].to(q.dtype)
    total = (in_set * mass).sum(-1, keepdim=True)
    tiny = torch.finfo(q.dtype).tiny
    now = (in_set * value).sum(-1, keepdim=True) / total.clamp(min=tiny)
    is_read = read[:, :, None].to(q.dtype)
    change = (mass * now - value) / (total + is_read * mass).clamp(min=tiny)
    # A skipped block is in no sum. In a row with an empty linear set its change would be infinite.
    return change.masked_fill(~(linear_set | read)[:, :, None], 0.0).sum(2)
