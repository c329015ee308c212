"""`Probe`: the loss of the first batch with its noise, which falls without the noise of other batches."""

import warnings

import torch

from dit_accel.finetune.movement import has_moved
from dit_accel.finetune.parts import Parts


class Probe:
    """Measures the loss of the first batch, before training and while it goes on.

    Args:
        parts: of the run; `first_loss` is kept in its counters.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def begin(self) -> None:
        """Measure the loss before anything has trained, unless an earlier part of the run has."""
        counters = self.parts.state.counters
        if "first_loss" not in counters:
            counters["first_loss"] = self._loss()

    def measure(self, done: int) -> float:
        """Return the loss now; warn if it is what it was before training.

        Args:
            done: finished steps, for the message.
        """
        first, now = float(self.parts.state.counters["first_loss"]), self._loss()
        if not has_moved(first, now):
            warnings.warn(
                f"the loss of the first batch has not moved in {done} steps ({first:.6g}): nothing that it depends on "
                "trains, or learning_rate is far too low",
                stacklevel=2,
            )
        return now

    @torch.no_grad()
    def _loss(self) -> float:
        parts, processes = self.parts, self.parts.engine.processes
        topk = parts.topk_at(parts.steps)
        if topk is not None:
            parts.sla.set_topk(topk)  # annealing must not look like learning
        parts.model.train()
        seed_step(parts.config.seed, 0, processes.rank)
        batch, first = parts.feed.micro(0, 0), parts.feed.first_row(0)
        with parts.engine.accelerator.autocast():
            loss, _ = parts.objective(parts.model, batch, step=0, first=first)
        return float(processes.sum(loss.detach().double().cpu())) / processes.count


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a model draws in a step, such as dropout, so that a resumed run draws the same."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4096 + rank) % 2**63)
