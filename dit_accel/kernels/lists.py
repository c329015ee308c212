"""Conversion between block masks and the index lists that kernels read."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor


class Lists(NamedTuple):
    """Index lists: counts `[..., rows]` and ascending indices `[..., rows, n]`, int32. Unused places hold 0."""

    counts: Int[Tensor, "*b rows"]
    indices: Int[Tensor, "*b rows n"]


LIST_BYTES = 2**24
"""Size of lists in bytes above which `prefix_lists` waits for the device to make them narrower."""


def reads_freely(x: Tensor) -> bool:
    """Return whether a number can be read from `x` without a device synchronisation or a graph break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def block_lists(mask: Bool[Tensor, "*b rows n_k"], most: int | None = None) -> Lists:
    """Return the True entries of each row of `mask` as lists.

    Args:
        mask: block mask.
        most: upper bound of the True entries of a row. On a CPU the lists are as wide as the longest row. On other
            devices that would need a synchronisation, so they are `most` wide. Default: `n_k`.
    """
    if reads_freely(mask):
        most = int(mask.sum(-1, dtype=torch.int32).max()) if mask.numel() else 0
    n_k = mask.shape[-1]
    return lists_of_width(mask, n_k if most is None else min(max(most, 1), n_k))


def lists_of_width(mask: Bool[Tensor, "*b rows n_k"], width: int) -> Lists:
    """Return the True entries of each row of `mask`, at most `width` of them, as lists of this width."""
    ends = mask.cumsum(-1, dtype=torch.int32)
    # All other entries are scattered to one spare place, which is cut off.
    place = torch.where(mask, ends - 1, width).long()
    index = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand_as(place)
    lists = torch.zeros(*ends.shape[:-1], width + 1, dtype=torch.int32, device=mask.device)
    lists = lists.scatter_(-1, place, index)[..., :width].contiguous()
    return Lists(ends[..., -1].contiguous(), lists)


def prefix_lists(
    mask: Bool[Tensor, "*b rows n_k"], long_rows: Int[Tensor, " n_long"], most: int | None
) -> Lists:
    """Return the lists of `block_lists`, no wider than needed by the rows that need a list.

    A long row that holds the first blocks without a gap needs no list. If its count exceeds the width of the lists, the
    row holds the blocks 0 to count - 1. A few rows that read every key then do not widen the lists of all other rows.
    Large lists on a GPU cost one device synchronisation, which reads the width.

    Args:
        mask: block mask.
        long_rows: indices of the long rows.
        most: as in `block_lists`.
    """
    wait = mask.is_cuda and 4 * mask.numel() > LIST_BYTES and most is None
    wait = wait and not torch.compiler.is_compiling()
    wait = wait and not torch.cuda.is_current_stream_capturing()
    if not len(long_rows) or not mask.numel() or not (reads_freely(mask) or wait):
        return block_lists(mask, most)
    counts = mask.sum(-1, dtype=torch.int32)
    rows = mask.index_select(-2, long_rows)
    places = torch.arange(1, mask.shape[-1] + 1, dtype=torch.int32, device=mask.device)
    of_long = counts.index_select(-1, long_rows)
    gap = (rows * places).amax(-1) > of_long
    listed = counts.index_copy(-1, long_rows.long(), torch.where(gap, of_long, 0))
    width = max(1, int(listed.max()))
    _, indices = lists_of_width(mask & (counts <= width)[..., None], width)
    return Lists(counts, indices)


def trim(lists: Lists) -> Lists:
    """Return the lists cut to the length of the longest row. Reads the counts."""
    counts, indices = lists
    width = max(1, int(counts.max())) if counts.numel() else 1
    return lists if width >= indices.shape[-1] else Lists(counts, indices[..., :width].contiguous())


def block_mask(
    counts: Int[Tensor, "*b rows"],
    indices: Int[Tensor, "*b rows most"],
    n_k: int,
    *,
    prefix: bool = False,
) -> Bool[Tensor, "*b rows n_k"]:
    """Return the mask `[..., rows, n_k]` of lists, the inverse of `block_lists` (with `prefix`, of `prefix_lists`)."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    spare = torch.where(valid, indices, n_k).long()
    mask = torch.zeros(*counts.shape, n_k + 1, dtype=torch.bool, device=indices.device)
    mask = mask.scatter_(-1, spare, True)[..., :n_k]
    if not prefix:
        return mask
    first = torch.arange(n_k, device=indices.device) < counts[..., None]
    return mask | (first & (counts > indices.shape[-1])[..., None])


def pack_bits(mask: Bool[Tensor, "*b n_k"]) -> UInt8[Tensor, "*b n_bytes"]:
    """Return the mask with eight blocks per byte, the first block in the lowest bit."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) << bit).sum(-1, dtype=torch.uint8)


def transpose_lists(
    counts: Int[Tensor, "*b rows"], indices: Int[Tensor, "*b rows most"], n_k: int
) -> Lists:
    """Return the transposed lists: for each of the `n_k` blocks, the rows that hold it."""
    return block_lists(block_mask(counts, indices, n_k).mT)


def check_range(name: str, x: Tensor, most: int) -> None:
    """Raise ValueError unless every number is between 0 and `most`. Reads the tensor."""
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= most:
        raise ValueError(
            f"{name}: numbers from {int(x.min())} to {int(x.max())}; accepted are numbers from 0 to {most}"
        )
