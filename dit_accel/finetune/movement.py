"""Check that training has an effect: parameter updates, realised density and the loss on the first batch."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.processes import Processes
from dit_accel.finetune.shards import local_part

SAMPLES = 4096
"""Largest number of values per tensor that `UpdateMeter` compares."""
LEAST_MOVEMENT = 1e-6
"""Smallest relative change of the loss on the first batch that counts as a change."""


class UpdateMeter:
    """Measure the size of an update of each parameter group, relative to its weights.

    The meter compares at most `SAMPLES` evenly spaced values of each tensor, so that it needs no second copy of a
    large model.

    Args:
        groups: optimiser groups with `name` and `params`.
        processes: processes of the run.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], processes: Processes) -> None:
        self.processes = processes
        self.groups = {group["name"]: list(group["params"]) for group in groups}
        self._before: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Record the weights before an update."""
        self._before = {
            name: [_sample(x).clone() for x in params] for name, params in self.groups.items()
        }

    @torch.no_grad()
    def end(self) -> dict[str, float]:
        """Return the norm of the update since `begin` divided by the norm of the weights, by group."""
        updates = {}
        for name, params in self.groups.items():
            sums = torch.zeros(2, dtype=torch.float64)
            for x, before in zip(params, self._before[name], strict=True):
                share = local_part(x)[0].numel() / max(1, before.numel())
                difference = (_sample(x).double() - before.double()).square().sum()
                sums += share * torch.stack([difference, before.double().square().sum()]).cpu()
            update, weights = self.processes.sum(sums).sqrt().tolist()
            # Weights that are all zero have no relative update. Report the absolute update instead.
            updates[name] = update / weights if weights else update
        self._before = {}
        return updates


def _sample(x: Tensor) -> Tensor:
    flat = local_part(x)[0].flatten()
    return flat[:: max(1, -(-flat.numel() // SAMPLES))]


class DensityMeter:
    """Measure the realised density of sparse attention between two readings.

    Args:
        sla: the installed `SparseAttention`, whose counters are read.
    """

    def __init__(self, sla: Any) -> None:
        self.sla = sla
        self._last: dict[str, tuple[Tensor, Tensor]] = {}

    def reset(self) -> None:
        """Ignore everything counted so far, such as the calls of a validation."""
        for name, layer in self.sla.layers.items():
            self._last[name] = (layer.tally, layer.tally.clone())

    def read(self, processes: Processes) -> tuple[int, float | None]:
        """Return the number of sparse calls since the last reading, and their density, or None without calls."""
        new = []
        for name, layer in self.sla.layers.items():
            last = self._last.get(name)
            if last is None or last[0] is not layer.tally:
                new.append(layer.tally)  # the counter was replaced and restarted at zero
            else:
                new.append(layer.tally - last[1])
        self.reset()
        total = torch.stack([x.cpu() for x in new]).sum(0).double()
        calls, attended, pairs = processes.sum(total).tolist()
        return int(calls), attended / pairs if pairs else None


class MovementGuard:
    """Raise an error if nothing trains or if no layer runs sparse.

    Args:
        scheduled: True if at least one layer may run sparse.
    """

    def __init__(self, *, scheduled: bool) -> None:
        self.scheduled = scheduled
        self._checked_updates = self._checked_density = False

    def check_updates(
        self, step: int, updates: Mapping[str, float], rates: Mapping[str, float]
    ) -> None:
        """Check the first update that has a learning rate above zero. Warn about groups that did not change.

        Args:
            step: index of the step, for messages.
            updates: result of `UpdateMeter.end`.
            rates: learning rate of each group in this update.

        Raises:
            RuntimeError: if no group with a learning rate above zero changed.
        """
        if self._checked_updates or not any(rates.values()):
            return
        self._checked_updates = True
        still = [name for name, x in updates.items() if rates[name] and not x]
        if len(still) == sum(1 for x in rates.values() if x):
            raise RuntimeError(
                f"nothing trains: step {step} changed no parameter of the groups {', '.join(still)}. Their gradients are "
                "zero, or the loss does not depend on them"
            )
        for name in still:
            warnings.warn(
                f"the parameter group {name!r} does not train: step {step} changed none of its parameters",
                stacklevel=2,
            )

    def check_density(self, calls: int, reasons: Callable[[], Mapping[str, int]]) -> None:
        """Check that sparse attention ran in the first step.

        Args:
            calls: number of sparse attention calls in the step.
            reasons: function that returns the number of dense calls by reason.

        Raises:
            RuntimeError: if every layer ran dense, because the run would train dense attention.
        """
        if self._checked_density:
            return
        self._checked_density = True
        if calls or not self.scheduled:
            return
        why = ", ".join(f"{name} ({count} calls)" for name, count in reasons().items())
        raise RuntimeError(
            f"sla: no layer ran sparse in the first step ({why or 'attention was not called'}), so the run would train "
            "dense attention; use crossover='never', longer samples, or fewer dense_layers"
        )


def has_moved(first: float, now: float) -> bool:
    """Return True if the loss on the same batch and noise has changed since the start of the run."""

    return not math.isclose(first, now, rel_tol=LEAST_MOVEMENT, abs_tol=0.0)
