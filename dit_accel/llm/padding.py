"""Masks of real tokens, with or without a window, and the rows of a padded batch grouped by where their tokens lie."""

from collections import defaultdict

import torch
from jaxtyping import Bool
from torch import Tensor


def with_window(mask: Bool[Tensor, "b l_k"], window: int) -> Bool[Tensor, "b l_k window"]:
    """Return a mask of real tokens whose last size tells the window; it takes no more memory.

    Some models (Qwen2-MoE, PhiMoE) give their attention function no window: it must come with the mask.
    """
    return mask[:, :, None].expand(-1, -1, window)


def window_of(mask: Tensor | None) -> int | None:
    """Return the window of a mask that `with_window` made; None for other masks."""
    return mask.shape[2] if mask is not None and mask.ndim == 3 else None


def broadcast_mask(mask: Tensor | None) -> Tensor | None:
    """Return a mask of real tokens or of pairs as a mask of pairs, `[B, 1, 1, Lk]` or `[B, 1, Lq, Lk]`."""
    if mask is None or mask.ndim == 4:
        return mask
    return (mask if mask.ndim == 2 else mask[:, :, 0])[:, None, None]


def real_spans(
    mask: Bool[Tensor, "b l_k"] | Bool[Tensor, "b l_k window"],
) -> dict[tuple[int, int], list[int]] | None:
    """Return the rows of each span (first token, end) of real tokens. Waits for the device.

    Args:
        mask: True where a token is real.

    Returns:
        None if the tokens of a row do not lie side by side.
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
