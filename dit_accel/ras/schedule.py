"""`Schedule`: the dense steps, partial steps and forecast steps of a run."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_accel.config import RASConfig, num_steps_of
from dit_accel.ras.budget import least_error


@dataclass(frozen=True)
class Schedule:
    """Kinds of the steps of one run, and sizes of its tiles."""

    tiles: tuple[int | None, ...]
    """Number of active tiles in each step. None: dense step. 0: forecast step, in which the transformer does not run."""
    tile: int
    """Number of tokens in a tile."""
    num_tiles: int
    """Number of tiles."""
    choices: tuple[int, ...] = ()
    """Numbers of tiles, ascending, on which a forecast step may run if error control asks for it."""

    @property
    def num_steps(self) -> int:
        return len(self.tiles)

    @property
    def has_partial_steps(self) -> bool:
        """True if a step may run on some of the tokens."""
        return any(self.tiles) or bool(self.choices)

    def capacity(self, step: int, ahead: int) -> list[int | None]:
        """Return the numbers of tiles that are updated in the next 0, 1, ..., `ahead` steps after `step`.

        None from the first dense step or the end of the run on, because all tiles are updated there.
        """
        total: int | None = 0
        sums: list[int | None] = [0]
        for i in range(step + 1, step + 1 + ahead):
            tiles = self.tiles[i] if i < self.num_steps else None
            total = None if total is None or tiles is None else total + tiles
            sums.append(total)
        return sums


def tile_size(num_tokens: int, region: str) -> int:
    """Return the number of tokens in a tile: 64, or 32 or 16 for short sequences, so that ratios are not too coarse."""
    if region == "token":
        return 1
    return next((size for size in (64, 32) if num_tokens >= 64 * size), 16)


def dense_steps(config: RASConfig, num_steps: int) -> set[int]:
    """Return the steps that are dense with any budget: warm-up, tail and resets.

    Resets past the end of the run are dropped with a warning.
    """
    tail = num_steps_of(config.tail, num_steps)
    dense = {*range(config.warmup_of(num_steps)), *range(num_steps - tail, num_steps), 0}
    for reset in config.resets_of(num_steps):
        if isinstance(reset, int) and reset >= num_steps:
            warnings.warn(
                f"resets: step {reset} is past the end of a run of {num_steps} steps; dropped",
                stacklevel=2,
            )
        dense.add(num_steps_of(reset, num_steps))
    return {step for step in dense if 0 <= step < num_steps}


def ratio_at(config: RASConfig, step: int, num_steps: int) -> float:
    """Return the configured ratio of a partial step."""
    pieces = [(0.0, config.ratio)] if isinstance(config.ratio, int | float) else config.ratio
    return [ratio for start, ratio in pieces if start * num_steps <= step + 1e-9][-1]  # type: ignore[misc, operator, union-attr]


def plan_steps(
    config: RASConfig,
    num_steps: int,
    num_tokens: int,
    tile: int | None = None,
    *,
    levels: Sequence[float] = (),
    cost: Callable[[float], float] = float,
) -> Schedule:
    """Return the schedule of a run.

    Without a budget, every step that is not dense is partial. With a budget, the kinds of steps minimise the predicted
    error (`least_error`). With `control`, every step that is not dense is a forecast step with `choices`.

    The number of active tiles is the nearest number to ratio * tiles, but large enough for `max_age`. If the ratios give
    more than `n_levels` different numbers, numbers are raised to the next one that is kept.

    Args:
        config: settings.
        num_steps: number of steps of the run.
        num_tokens: number of image tokens.
        tile: number of tokens that are selected together. Default: according to `config.region`.
        levels: noise levels in [0, 1] of the steps and of the end, `num_steps + 1` numbers. Needed with a budget.
        cost: function from the share of tokens that run to the share of a dense call's cost.
    """
    tile = tile or tile_size(num_tokens, config.region)
    num_tiles = math.ceil(num_tokens / tile)
    limit = config.age_limit
    least = 1 if limit is None else math.ceil(num_tiles / (limit + 1))

    def active(step: int) -> int:
        return max(least, 1, round(ratio_at(config, step, num_steps) * num_tiles))

    dense = dense_steps(config, num_steps)
    partial = [] if config.ratio is None else [k for k in range(num_steps) if k not in dense]
    wanted = {k: active(k) for k in partial}
    counts = sorted(set(wanted.values()))
    if config.n_levels is not None and len(counts) > config.n_levels:
        # Kept counts are evenly spread over the sorted counts and include the largest one.
        last = len(counts) - 1
        kept = {counts[round(last * (i + 1) / config.n_levels)] for i in range(config.n_levels)}
        wanted = {k: min(x for x in kept if x >= n) for k, n in wanted.items()}
    tiles: list[int | None] = [None if k in dense else wanted.get(k) for k in range(num_steps)]
    budget = config.budget_of(num_steps)
    choices: set[int] = set()
    if config.control is not None:
        tiles = [None if k in dense else 0 for k in range(num_steps)]
        for count in wanted.values():
            choices |= {math.ceil(count / 2), count} - {num_tiles}
    if budget is not None:
        shares = [
            None if k in dense or config.ratio is None else wanted[k] / num_tiles
            for k in range(num_steps)
        ]
        found = least_error(
            levels,
            budget * num_steps,
            dense,
            [None if x is None else (x, cost(x)) for x in shares],
        )
        tiles = [
            None if kind == "dense" else 0 if kind == "forecast" else wanted[k]
            for k, kind in enumerate(found)
        ]
    return Schedule(tuple(tiles), tile, num_tiles, tuple(sorted(choices)))
