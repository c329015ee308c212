"""`Probe`: measure the loss on a fixed batch with fixed noise, which shows progress better than the training loss."""

import warnings

import torch

from dit_accel.finetune.movement import has_moved
from dit_accel.finetune.parts import Parts


class Probe:
    """Measure the loss on the first batch before and during training.

    Args:
        parts: components of the run. The counter `first_loss` stores the loss before training.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def begin(self) -> None:
        """Measure the loss before training. A resumed run keeps the value of its checkpoint."""
        counters = self.parts.state.counters
        if "first_loss" not in counters:
            counters["first_loss"] = self._loss()

    def measure(self, done: int) -> float:
        """Return the current loss. Warn if it equals the loss before training.

        Args:
            done: number of finished steps, for the message.
        """
        first, now = float(self.parts.state.counters["first_loss"]), self._loss()
        if not has_moved(first, now):
            warnings.warn(
                f"the loss on the first batch has not changed in {done} steps ({first:.6g}): the parameters that it "
                "depends on do not train, or learning_rate is far too low",
                stacklevel=2,
            )
        return now

    @torch.no_grad()
    def _loss(self) -> float:
        parts, processes = self.parts, self.parts.engine.processes
        topk = parts.topk_at(parts.steps)
        if topk is not None:
            parts.sla.set_topk(
                topk
            )  # measure at the final topk, so that annealing does not change the loss
        parts.model.train()
        seed_step(parts.config.seed, 0, processes.rank)
        batch, first = parts.feed.micro(0, 0), parts.feed.first_row(0)
        with parts.engine.accelerator.autocast():
            loss, _ = parts.objective(parts.model, batch, step=0, first=first)
        return float(processes.sum(loss.detach().double().cpu())) / processes.count


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for a step, so that a resumed run repeats random operations of the model such as dropout."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4096 + rank) % 2**63)
