"""`real_spans`: the rows of a padded batch, grouped by where their tokens lie."""

from collections import defaultdict

import torch
from jaxtyping import Bool
from torch import Tensor


def real_spans(mask: Bool[Tensor, "b l_k"]) -> dict[tuple[int, int], list[int]] | None:
    """Return the rows of each span (first token, end) of real tokens. Waits for the device.

    Args:
        mask: True where a token is real.

    Returns:
        None if the tokens of a row do not lie side by side.
    """
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
