"""Choice of active tiles: pure functions of ages and scores, with equal results on every device.

Tensors are `[S, M]`: S samples of M tiles. Tiles with larger scores are preferred. Ties go to the lower index, so that
neighbouring tiles are updated together after a dense step, when all ages are equal.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def tile_tokens(num_tokens: int, tile: int, device: torch.device) -> Int[Tensor, "m tile"]:
    """Return the tokens of each tile, ascending. A short last tile repeats its last token."""
    m = -(-num_tokens // tile)
    return torch.arange(m * tile, device=device).clamp(max=num_tokens - 1).view(m, tile)


def rank_by(score: Float[Tensor, "s m"]) -> Int[Tensor, "s m"]:
    """Return the rank of each tile by descending score; ties go to the lower index."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def token_scores(change: Float[Tensor, "s n c"], kind: str, cell: int = 1) -> Float[Tensor, "s n"]:
    """Return the region metric of each token (RAS, arXiv 2502.10389, section 3.2).

    Args:
        change: change of the latents of each token in the last step; c = `cell` positions times channels.
        kind: "std" for the unbiased standard deviation over channels, "l2norm" for the norm; both are averaged over the
            positions of a token.
        cell: number of latent positions of a token.
    """
    change = change.float().unflatten(2, (cell, -1))
    metric = change.std(-1) if kind == "std" else change.norm(dim=-1)
    return metric.mean(-1)


def band_score(metric: Float[Tensor, "s m"], count: int, high_ratio: float) -> Float[Tensor, "s m"]:
    """Return scores whose `count` largest are a band of the sorted metric.

    Of the m - count inactive tiles, the share `high_ratio` has the highest metrics and the rest has the lowest. With
    high_ratio=1, the paper's default, the tiles with the lowest metrics are active.
    """
    m = metric.shape[1]
    below = int((m - count) * (1 - high_ratio))
    rank = m - 1 - rank_by(metric.double())  # 0 for the lowest metric
    return -(rank - (below + (count - 1) / 2)).abs().double()


def choose(
    score: Float[Tensor, "s m"],
    age: Int[Tensor, "s m"],
    capacity: list[int | None],
    count: int,
    max_age: int | None,
) -> Int[Tensor, "s count"]:
    """Return the `count` tiles with the highest scores that keep the age limit (earliest deadline first).

    Args:
        score: score of each tile.
        age: number of steps since each tile's last update.
        capacity: capacity[j] is the number of tiles that are updated in the j steps after this one (None: all).
        count: number of tiles to choose.
        max_age: largest accepted age after the step; None: no limit.

    Returns:
        Indices of the chosen tiles, ascending.
    """
    s, m = score.shape
    rank = rank_by(score)
    chosen = torch.zeros(s, m, dtype=torch.bool, device=score.device)
    if max_age is not None:
        for j, later in enumerate(capacity[: max_age + 1]):
            if later is None:
                break
            # Tiles whose deadline is at most j steps away. Those that later steps cannot update are chosen now.
            due = age >= max_age - j
            need = due.sum(1) - later - (chosen & due).sum(1)
            free = due & ~chosen
            place = torch.where(free, rank, m).argsort(dim=1, stable=True).argsort(dim=1)
            chosen |= free & (place < need[:, None])
    # Chosen tiles first, then other tiles by rank.
    key = torch.where(chosen, rank - m, rank)
    return key.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
