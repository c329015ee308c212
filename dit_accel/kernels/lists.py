"""Conversion between masks of blocks and the lists of indices that kernels walk."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor


class Lists(NamedTuple):
    """Counts `[..., rows]` and ascending indices `[..., rows, n]`, int32; unused places hold 0."""

    counts: Int[Tensor, "*b rows"]
    indices: Int[Tensor, "*b rows n"]


LIST_BYTES = 2**24
"""A list of more bytes is worth waiting for the device once, to make it narrower (`prefix_lists`)."""


def reads_freely(x: Tensor) -> bool:
    """Return whether a number can be read from `x` without stalling a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def block_lists(mask: Bool[Tensor, "*b rows n_k"], most: int | None = None) -> Lists:
    """The True entries of each row of `mask`.

    Args:
        most: a row holds at most this many. On a CPU the lists are as wide as the longest row;
            elsewhere that number would stall the device, so they are `most` wide (default: all).
    """
    if reads_freely(mask):
        most = int(mask.sum(-1, dtype=torch.int32).max()) if mask.numel() else 0
    n_k = mask.shape[-1]
    return lists_of_width(mask, n_k if most is None else min(max(most, 1), n_k))


def lists_of_width(mask: Bool[Tensor, "*b rows n_k"], width: int) -> Lists:
    """The True entries of each row of `mask`, of which there are at most `width`."""
    ends = mask.cumsum(-1, dtype=torch.int32)
    # Entries that are not kept all land in one spare place, which is cut off.
    place = torch.where(mask, ends - 1, width).long()
    index = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand_as(place)
    lists = torch.zeros(*ends.shape[:-1], width + 1, dtype=torch.int32, device=mask.device)
    lists = lists.scatter_(-1, place, index)[..., :width].contiguous()
    return Lists(ends[..., -1].contiguous(), lists)


def prefix_lists(
    mask: Bool[Tensor, "*b rows n_k"], long_rows: Int[Tensor, " n_long"], most: int | None
) -> Lists:
    """The lists of `block_lists`, no wider than the rows that need a list.

    A long row that holds the first blocks without a gap needs none: its count says everything. Where it is larger than
    the lists are wide, the row holds blocks 0 to count - 1. So a few rows that read every key do not make the lists of all
    others as wide as theirs. Reads the width, so on a GPU this waits for the device, and only for large lists.
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
    """The lists as wide as the longest row, which is read."""
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
    """The mask that `block_lists` came from, or with `prefix` `prefix_lists`."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    spare = torch.where(valid, indices, n_k).long()
    mask = torch.zeros(*counts.shape, n_k + 1, dtype=torch.bool, device=indices.device)
    mask = mask.scatter_(-1, spare, True)[..., :n_k]
    if not prefix:
        return mask
    first = torch.arange(n_k, device=indices.device) < counts[..., None]
    return mask | (first & (counts > indices.shape[-1])[..., None])


def pack_bits(mask: Bool[Tensor, "*b n_k"]) -> UInt8[Tensor, "*b n_bytes"]:
    """Eight blocks to a byte, the first in the lowest bit: a kernel asks for one with two shifts."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) << bit).sum(-1, dtype=torch.uint8)


def transpose_lists(
    counts: Int[Tensor, "*b rows"], indices: Int[Tensor, "*b rows most"], n_k: int
) -> Lists:
    """The same pairs listed by column: for each of `n_k` blocks, the rows that hold it."""
    return block_lists(block_mask(counts, indices, n_k).mT)


def check_range(name: str, x: Tensor, most: int) -> None:
    """Raises ValueError unless every number is between 0 and `most`; reads the tensor."""
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= most:
        raise ValueError(
            f"{name}: accepted are numbers between 0 and {most}, got {int(x.min())} to {int(x.max())}"
        )
