"""`TileSelection`: ages and errors of a run's tiles, and the tiles that are active in the current step."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.config import RASConfig
from dit_accel.ras.control import fewest_tiles, longest
from dit_accel.ras.schedule import Schedule
from dit_accel.ras.selection import band_score, choose, rank_by


class TileSelection:
    """Active tiles of each sample, shared by all contexts of a step. Samples are the rows of the run's first call."""

    def __init__(
        self,
        config: RASConfig,
        schedule: Schedule,
        rows: int,
        device: torch.device,
        weights: Sequence[float] = (),
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.weights = weights
        """Weight of an error in each step, see `step_weights`; needed if the schedule has `choices`."""
        shape = (rows, schedule.num_tiles)
        self.age = torch.zeros(shape, dtype=torch.long, device=device)
        self.dropped = torch.zeros(shape, dtype=torch.float32, device=device)
        """Number of times that each tile was left out in this run."""
        self.draw = _draw(schedule, device) if config.selection == "random" else None
        self.step = -1
        self.tiles: Tensor | None = None
        """Active tiles `[S, count]`, ascending; None: all tiles."""
        self.too_wrong = False
        """True if this step runs on all tiles because of measured errors."""
        self._incomplete = 0
        """Number of steps since the last step that ran on all tiles."""
        # Equal before the first measurement, so that the oldest tiles are chosen.
        self.errors = torch.ones(shape, dtype=torch.float64, device=device)
        """Squared relative error of each tile's last measured forecast, divided by the squared difference of noise levels
        that the forecast spanned; summed over contexts."""
        self.updated = torch.zeros(shape, dtype=torch.float64, device=device)
        """Noise level of each tile's last update."""
        self._measured = -1

    @property
    def wants_errors(self) -> bool:
        """True if errors of forecasts have to be measured."""
        schedule = self.schedule
        by_error = self.config.selection == "error" and schedule.has_partial_steps
        return by_error or bool(schedule.choices)

    def begin_step(
        self, step: int, metric: Float[Tensor, "s m"] | None, level: Float[Tensor, ""] | None = None
    ) -> None:
        """Choose the tiles of a step. Later calls of the same step do nothing.

        Args:
            step: index of the step.
            metric: region metric of each tile (see `token_scores`); None if it is not known yet.
            level: noise level of the step; needed for selection="error".
        """
        if step == self.step:
            return
        self.step = step
        count = self.schedule.tiles[step]
        self.too_wrong = False
        if count is not None and self.schedule.choices and level is not None:
            count = self._fewest(step, metric, level)
            self.too_wrong = count is None
        self._incomplete = 0 if count is None else self._incomplete + 1
        if count is None:
            self.tiles = None
            self.age.zero_()
            if level is not None:
                self.updated.copy_(level.expand_as(self.updated))
            return
        if count == 0:
            self.tiles = self.age.new_zeros(len(self.age), 0)
            self.age += 1
            return
        score = self._score(step, metric, count, level)
        limit = self.config.age_limit
        capacity = self.schedule.capacity(step, 0 if limit is None else limit)
        self.tiles = choose(score, self.age, capacity, count, limit)
        self.age += 1
        self.age.scatter_(1, self.tiles, 0)
        if level is not None:
            self.updated.scatter_(1, self.tiles, level.double().expand(self.tiles.shape))
        self.dropped += 1
        self.dropped.scatter_add_(1, self.tiles, -torch.ones_like(self.tiles, dtype=torch.float32))

    def measure(self, errors: Float[Tensor, "r m"], known: Bool[Tensor, "r m"]) -> None:
        """Record the errors of the forecasts of a call in this step.

        Args:
            errors: errors of one context as in `errors`; rows are samples, or several rows for each sample.
            known: tiles that this call measured.
        """
        samples = len(self.errors)
        if len(errors) % samples == 0:  # rows of the same samples, one block after the other
            errors = errors.unflatten(0, (-1, samples)).sum(0)
            known = known.unflatten(0, (-1, samples)).any(0)
        else:
            errors, known = (x.repeat(samples // len(x), 1) for x in (errors, known))
        before = self.errors if self._measured == self.step else torch.zeros_like(self.errors)
        self._measured = self.step
        self.errors = torch.where(known, before + errors, self.errors)

    def _fewest(self, step: int, metric: Tensor | None, level: Tensor) -> int | None:
        """Return the number of tiles that have to run in this step; None: all."""
        schedule = self.schedule
        if self._measured < 0 or self._incomplete >= longest(schedule.num_steps):
            return None
        assert self.config.control is not None
        choices = (0, *schedule.choices)
        return fewest_tiles(
            self.errors * (self.updated - level).square() * self.weights[step] ** 2,
            rank_by(self._score(step, metric, choices[-1], level)),
            choices,
            float(self.config.control),
        )

    def _score(self, step: int, metric: Tensor | None, count: int, level: Tensor | None) -> Tensor:
        config = self.config
        if config.selection == "error" and level is not None:
            return self.errors.sqrt() * (self.updated - level).abs()
        if self.draw is not None:
            return self.draw[step].expand_as(self.age)
        if config.selection == "age" or metric is None:
            return self.age.double()
        starved = metric * torch.exp(-config.starvation_scale * self.dropped)
        return band_score(starved, count, config.high_ratio)


def _draw(schedule: Schedule, device: torch.device) -> Float[Tensor, "steps m"]:
    """Return random scores, equal for all samples and devices, so that a batch gives the results of single runs."""
    draws = [
        torch.rand(
            schedule.num_tiles,
            generator=torch.Generator().manual_seed(step),
            dtype=torch.float64,
        )
        for step in range(schedule.num_steps)
    ]
    return torch.stack(draws).to(device)
