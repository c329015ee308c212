"""Between a mask of blocks and the lists of indices that kernels walk."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def block_lists(
    mask: Bool[Tensor, "b h n_q n_k"],
) -> tuple[Int[Tensor, "b h n_q"], Int[Tensor, "b h n_q most"]]:
    """Counts and ascending indices of the True entries of each row; unused places hold 0."""
    counts = mask.sum(-1, dtype=torch.int32)
    most = int(counts.max()) if counts.numel() else 0
    # A stable sort of "not kept" moves the kept ones to the front without changing their order.
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)[..., : max(most, 1)].int()
    valid = torch.arange(order.shape[-1], device=mask.device) < counts[..., None]
    return counts, order.masked_fill(~valid, 0)


def block_mask(
    counts: Int[Tensor, "b h n_q"], indices: Int[Tensor, "b h n_q most"], n_k: int
) -> Bool[Tensor, "b h n_q n_k"]:
    """The mask that `block_lists` came from."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    mask = torch.zeros(*counts.shape, n_k, dtype=torch.int8, device=indices.device)
    return mask.scatter_reduce_(-1, indices.long(), valid.to(torch.int8), "amax").bool()
