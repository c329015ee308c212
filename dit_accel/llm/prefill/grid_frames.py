"""Grids over video frames: the place in every frame with the highest attention from the last queries."""

from collections import defaultdict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.prefill.grid_detection import EVENNESS
from dit_accel.llm.prefill.pattern import Spans


def frame_starts(spans: Spans) -> dict[int, list[int]]:
    """Return the first tokens of all video frames by frame size, for sizes with at least two frames.

    Frames may be separated by timestamp tokens, so their distance can be larger than their size.
    """
    starts: dict[int, list[int]] = defaultdict(list)
    for start, stop, name in spans:
        if name == "video":
            starts[stop - start].append(start)
    return {size: found for size, found in starts.items() if len(found) > 1}


def frame_columns(
    sums: Float[Tensor, "h l_k"],
    frames: dict[int, list[int]],
    *,
    first: int,
    stop: int,
    min_gain: float | int = 0.05,
) -> Int[Tensor, "h n"]:
    """Return the keys at the best place of every frame for each head, in ascending order, padded with the number of keys.

    The best place has the largest sum of square roots of the attention weights, as in `detect`. Keys with very uneven
    weights do not count as a grid.

    Args:
        sums: mean attention of the last queries to each key.
        frames: first tokens of the frames by frame size.
        first, stop: range of keys to use. Frames outside of it are covered by the sink and the window.
        min_gain: attention by which a place must exceed the same number of average keys in its frames.
    """
    kv_len = sums.shape[-1]
    found = [torch.full((len(sums), 1), kv_len, dtype=torch.int32, device=sums.device)]
    for size, starts in frames.items():
        begin = torch.tensor(starts, device=sums.device)
        counted = begin[(begin >= first) & (begin + size <= stop)]
        if len(counted) < 2:
            continue
        weights = sums[:, counted[:, None] + torch.arange(size, device=sums.device)]
        roots, held = weights.sqrt().sum(1), weights.sum(1)
        place = roots.argmax(-1, keepdim=True)
        best_roots, best = roots.gather(-1, place), held.gather(-1, place)
        even = best_roots.square() >= EVENNESS * len(counted) * best
        good = even & (best - held.mean(-1, keepdim=True) >= min_gain)
        found.append(torch.where(good, begin + place, kv_len).int())
    return torch.cat(found, -1).sort(-1).values
