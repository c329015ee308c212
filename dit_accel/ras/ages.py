"""`Selection`: the ages of a run's tiles, and who is active in the step in progress."""

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.config import RASConfig
from dit_accel.ras.schedule import Schedule
from dit_accel.ras.selection import band_score, choose


class Selection:
    """One index set for each row of the run's first call, shared by all contexts of a step."""

    def __init__(
        self, config: RASConfig, schedule: Schedule, rows: int, device: torch.device
    ) -> None:
        self.config = config
        self.schedule = schedule
        shape = (rows, schedule.num_tiles)
        self.age = torch.zeros(shape, dtype=torch.long, device=device)
        self.dropped = torch.zeros(shape, dtype=torch.float32, device=device)
        """How often each tile was left out in this run."""
        self.draw = _draw(schedule, device) if config.selection == "random" else None
        self.step = -1
        self.tiles: Tensor | None = None
        """Active tiles `[S, count]`, ascending; None: all."""

    def begin_step(self, step: int, metric: Float[Tensor, "s m"] | None) -> None:
        """Choose for this step, unless a call of it has come before.

        Args:
            metric: the paper's region metric of each tile; None if it is not known yet.
        """
        if step == self.step:
            return
        self.step = step
        count = self.schedule.tiles[step]
        if count is None:
            self.tiles = None
            self.age.zero_()
            return
        score = self._score(step, metric, count)
        limit = self.config.age_limit
        capacity = self.schedule.capacity(step, 0 if limit is None else limit)
        self.tiles = choose(score, self.age, capacity, count, limit)
        self.age += 1
        self.age.scatter_(1, self.tiles, 0)
        self.dropped += 1
        self.dropped.scatter_add_(1, self.tiles, -torch.ones_like(self.tiles, dtype=torch.float32))

    def _score(self, step: int, metric: Tensor | None, count: int) -> Tensor:
        config = self.config
        if self.draw is not None:
            return self.draw[step].expand_as(self.age)
        if config.selection == "age" or metric is None:
            return self.age.double()
        starved = metric * torch.exp(-config.starvation_scale * self.dropped)
        return band_score(starved, count, config.high_ratio)


def _draw(schedule: Schedule, device: torch.device) -> Float[Tensor, "steps m"]:
    """The same for every sample, so that a batch gives what single runs give, and for every device."""
    draws = [
        torch.rand(
            schedule.num_tiles,
            generator=torch.Generator().manual_seed(step),
            dtype=torch.float64,
        )
        for step in range(schedule.num_steps)
    ]
    return torch.stack(draws).to(device)
