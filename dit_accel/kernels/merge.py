"""Exact merge of partial attentions over disjoint sets of keys."""

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.kernels.precision import wide


def merge_lse(
    *parts: tuple[Float[Tensor, "b h l d"], Float[Tensor, "b h l"]],
) -> tuple[Float[Tensor, "b h l d"], Float[Tensor, "b h l"]]:
    """Return the attention over the union of the keys of all parts. The parts must not share a key.

        lse = log sum_p exp(lse_p)      o = sum_p exp(lse_p - lse) o_p

    Args:
        parts: pairs `(o, lse)` as `block_sparse_attention(..., return_lse=True)` returns them: `[B, H, L, D]`
            and the natural log-sum-exp `[B, H, L]`. A query without a key in a part has lse = -inf there.

    Returns:
        `o` in the dtype of the parts, and `lse` in fp32 (fp64 for fp64). A query without a key in all parts gets 0 and
        -inf. Differentiable.

    Raises:
        ValueError: no part, or parts of different shape, dtype or device; the message names the part.
    """
    if not parts:
        raise ValueError("parts: got none; accepted is one or more (o, lse)")
    for i, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2:
            raise ValueError(f"parts[{i}]: a {type(part).__name__}; accepted is a pair (o, lse)")
    o, lse = parts[0]
    for i, (part_o, part_lse) in enumerate(parts):
        if (part_o.shape, part_o.dtype, part_o.device) != (o.shape, o.dtype, o.device):
            raise ValueError(
                f"parts[{i}]: o is {tuple(part_o.shape)} {part_o.dtype} on {part_o.device}, "
                f"parts[0] is {tuple(o.shape)} {o.dtype} on {o.device}"
            )
        if (part_lse.shape, part_lse.device) != (o.shape[:-1], o.device):
            raise ValueError(
                f"parts[{i}]: lse is {tuple(part_lse.shape)} on {part_lse.device}; "
                f"accepted is {tuple(o.shape[:-1])} on {o.device}"
            )
    dtype = wide(o)
    each = torch.stack([part_lse.to(dtype) for _, part_lse in parts])
    # Rows without any key would compute -inf - -inf. They are shifted by 0 instead, and get weights of 0.
    top = each.detach().amax(0)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weights = torch.exp(each - top)
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    merged = torch.zeros_like(o, dtype=dtype)
    for weight, part_lse, (part_o, _) in zip(weights, each, parts, strict=True):
        # Other libraries return NaN for queries without a key, which a weight of 0 would not remove.
        finite = part_o.to(dtype).masked_fill((part_lse == -torch.inf)[..., None], 0.0)
        merged = merged + weight[..., None] * finite
    out = torch.where(empty[..., None], torch.zeros_like(merged), merged / safe[..., None])
    lse = torch.where(empty, torch.full_like(total, -torch.inf), safe.log() + top)
    return out.to(o.dtype), lse
