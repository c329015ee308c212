"""Which steps are dense, and how many tiles are active on the others."""

import math
import warnings
from dataclasses import dataclass

from dit_accel.config import RASConfig, num_steps_of


@dataclass(frozen=True)
class Schedule:
    """The steps of one run."""

    tiles: tuple[int | None, ...]
    """Active tiles of each step; None is a dense step."""
    tile: int
    """Tokens per tile."""
    num_tiles: int

    @property
    def num_steps(self) -> int:
        return len(self.tiles)

    def capacity(self, step: int, ahead: int) -> list[int | None]:
        """Tiles updated in the next 0, 1, ..., `ahead` steps after `step`, summed up.

        None from the first dense step (or the end of the run) on: there, everything is updated.
        """
        total: int | None = 0
        sums: list[int | None] = [0]
        for i in range(step + 1, step + 1 + ahead):
            tiles = self.tiles[i] if i < self.num_steps else None
            total = None if total is None or tiles is None else total + tiles
            sums.append(total)
        return sums


def tile_size(num_tokens: int, region: str) -> int:
    """Tokens per tile: 64, or 32 or 16 on short sequences, so that ratios stay about what was asked."""
    if region == "token":
        return 1
    return next((size for size in (64, 32) if num_tokens >= 64 * size), 16)


def ratios(config: RASConfig, num_steps: int) -> list[float | None]:
    """The ratio of each step as configured; None where the step is dense.

    A reset given as a step past the end is dropped with a warning.
    """
    if isinstance(config.warmup, float):
        warmup = max(3, num_steps_of(config.warmup, num_steps))
    else:
        warmup = config.warmup
    tail = num_steps_of(config.tail, num_steps)
    dense = set(range(warmup)) | set(range(num_steps - tail, num_steps))
    for reset in config.resets_of(num_steps):
        if isinstance(reset, int) and reset >= num_steps:
            warnings.warn(
                f"resets: step {reset} is past the end of a run of {num_steps} steps; dropped",
                stacklevel=2,
            )
        dense.add(num_steps_of(reset, num_steps))
    pieces = [(0.0, config.ratio)] if isinstance(config.ratio, int | float) else config.ratio

    def ratio_at(step: int) -> float:
        return [ratio for start, ratio in pieces if start * num_steps <= step + 1e-9][-1]  # type: ignore[misc, operator]

    return [None if i in dense else ratio_at(i) for i in range(num_steps)]


def plan_steps(
    config: RASConfig, num_steps: int, num_tokens: int, tile: int | None = None
) -> Schedule:
    """The schedule of a run of `num_steps` model calls over `num_tokens` image tokens.

    The active tiles are the nearest number to ratio * tiles, but enough for `max_age`; where the
    ratios ask for more than `n_levels` different numbers, they are raised to the nearest kept one.
    `tile` tokens are selected together; default: as `config.region` says.
    """
    tile = tile or tile_size(num_tokens, config.region)
    num_tiles = math.ceil(num_tokens / tile)
    limit = config.age_limit
    least = 1 if limit is None else math.ceil(num_tiles / (limit + 1))

    def active(ratio: float) -> int:
        return max(least, 1, round(ratio * num_tiles))

    wanted = [None if ratio is None else active(ratio) for ratio in ratios(config, num_steps)]
    counts = sorted({n for n in wanted if n is not None})
    if config.n_levels is not None and len(counts) > config.n_levels:
        # Evenly spread over the sorted counts, the largest always among them.
        last = len(counts) - 1
        kept = {counts[round(last * (i + 1) / config.n_levels)] for i in range(config.n_levels)}
        wanted = [None if n is None else min(x for x in kept if x >= n) for n in wanted]
    return Schedule(tiles=tuple(wanted), tile=tile, num_tiles=num_tiles)
