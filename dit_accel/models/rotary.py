"""Rotary position embeddings of queries and keys; tables may differ between rows."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "b l h d"], cos: Float[Tensor, "b_ l 1 d"], sin: Float[Tensor, "b_ l 1 d"]
) -> Float[Tensor, "b l h d"]:
    """Rotate pairs of neighbouring channels. The tables hold the angle of each pair twice."""
    return rotate_pairs(x, cos[..., 0::2], sin[..., 1::2])


def rotate_pairs(
    x: Float[Tensor, "b l h d"], cos: Float[Tensor, "b_ l 1 n"], sin: Float[Tensor, "b_ l 1 n"]
) -> Float[Tensor, "b l h d"]:
    """Rotate pairs of neighbouring channels. The tables hold the angle of each pair once."""
    # unbind and not strided slices: the backward of a slice allocates a zero tensor of the size of x.
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (
        torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
    )


def for_heads(table: Tensor) -> Tensor:
    """Return a table `[L, D]` or `[B, L, D]` as `[1 or B, L, 1, D]`."""
    return (table if table.ndim == 3 else table[None])[:, :, None]
