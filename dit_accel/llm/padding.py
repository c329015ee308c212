"""Helpers for padding masks: encoding a window in a mask, and grouping the rows of a batch by their padding."""

from collections import defaultdict

import torch
from jaxtyping import Bool
from torch import Tensor


def with_window(mask: Bool[Tensor, "b l_k"], window: int) -> Bool[Tensor, "b l_k window"]:
    """Return a view of a padding mask whose last size is the window.

    Some models (Qwen2-MoE, PhiMoE) do not pass the window to the attention function, so the mask has to carry it.
    """
    return mask[:, :, None].expand(-1, -1, window)


def window_of(mask: Tensor | None) -> int | None:
    """Return the window of a mask from `with_window`; None for other masks."""
    return mask.shape[2] if mask is not None and mask.ndim == 3 else None


def broadcast_mask(mask: Tensor | None) -> Tensor | None:
    """Return any mask as a mask of query-key pairs, `[B, 1, 1, Lk]` or `[B, 1, Lq, Lk]`."""
    if mask is None or mask.ndim == 4:
        return mask
    return (mask if mask.ndim == 2 else mask[:, :, 0])[:, None, None]


def real_spans(
    mask: Bool[Tensor, "b l_k"] | Bool[Tensor, "b l_k window"],
) -> dict[tuple[int, int], list[int]] | None:
    """Group the rows of a batch by the span (start, stop) of their real tokens. Synchronizes with the device.

    Args:
        mask: True for real tokens, False for padding.

    Returns:
        Row indices by span; None if a row has padding between real tokens.
    """
    mask = mask if mask.ndim == 2 else mask[:, :, 0]
    length = mask.shape[1]
    at = torch.arange(length, device=mask.device)
    first = torch.where(mask, at, length).amin(1)
    end = torch.where(mask, at + 1, 0).amax(1)
    counts = mask.sum(1)
    table = torch.stack([first, end, counts], 1).tolist()
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (start, stop, count) in enumerate(table):
        if count == 0:
            start = stop = 0
        elif count != stop - start:
            return None
        groups[start, stop].append(row)
    return dict(groups)
