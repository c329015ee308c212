"""Which tiles are active: pure functions of ages and scores, the same for every device.

All work on tiles `[S, M]`, S samples of M tiles; larger scores are wanted more, ties go to the lower
index, so that after a dense step, when all ages are equal, neighbours are updated together.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def tile_tokens(num_tokens: int, tile: int, device: torch.device) -> Int[Tensor, "m tile"]:
    """The tokens of each tile, ascending. The last tile, if short, repeats its last token."""
    m = -(-num_tokens // tile)
    return torch.arange(m * tile, device=device).clamp(max=num_tokens - 1).view(m, tile)


def rank_by(score: Float[Tensor, "s m"]) -> Int[Tensor, "s m"]:
    """Place of each tile when sorted by falling score, ties by index."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def token_scores(change: Float[Tensor, "s n c"], kind: str, cell: int = 1) -> Float[Tensor, "s n"]:
    """The paper's region metric (RAS, arXiv 2502.10389, section 3.2) of every token.

    `change` is what the last step did to the latents of a token, `c` = `cell` latent positions times
    channels; "std" is the unbiased standard deviation over channels, "l2norm" the norm, both averaged
    over the positions.
    """
    change = change.float().unflatten(2, (cell, -1))
    metric = change.std(-1) if kind == "std" else change.norm(dim=-1)
    return metric.mean(-1)


def band_score(metric: Float[Tensor, "s m"], count: int, high_ratio: float) -> Float[Tensor, "s m"]:
    """Scores that make the wanted band of `metric` the top `count`.

    Of the m - count inactive tiles, the share `high_ratio` is taken from the highest metrics and the
    rest from the lowest; at 1 the lowest metrics are wanted (the paper's default).
    """
    m = metric.shape[1]
    below = int((m - count) * (1 - high_ratio))
    rank = m - 1 - rank_by(metric.double())  # 0 is the lowest metric
    return -(rank - (below + (count - 1) / 2)).abs().double()


def choose(
    score: Float[Tensor, "s m"],
    age: Int[Tensor, "s m"],
    capacity: list[int | None],
    count: int,
    max_age: int | None,
) -> Int[Tensor, "s count"]:
    """Earliest deadline first: the `count` tiles with the highest scores under the age limit.

    Args:
        score: how much a tile is wanted.
        age: steps since its last update.
        capacity: capacity[j] tiles will be updated in the j steps after this one (None: all).
        count: tiles to choose.
        max_age: no tile may be left older than this; None: no limit.

    Returns:
        Indices, ascending.
    """
    s, m = score.shape
    rank = rank_by(score)
    chosen = torch.zeros(s, m, dtype=torch.bool, device=score.device)
    if max_age is not None:
        for j, later in enumerate(capacity[: max_age + 1]):
            if later is None:
                break
            # Tiles whose deadline is at most j steps away: what later steps cannot take is due now.
            due = age >= max_age - j
            need = due.sum(1) - later - (chosen & due).sum(1)
            free = due & ~chosen
            place = torch.where(free, rank, m).argsort(dim=1, stable=True).argsort(dim=1)
            chosen |= free & (place < need[:, None])
    # The chosen ones first, then the others by rank.
    key = torch.where(chosen, rank - m, rank)
    return key.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
