"""Checks that training changes something: updates of each group, realised density, the loss of the first batch."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.processes import Processes
from dit_accel.finetune.shards import local_part

SAMPLES = 4096
"""Values of each tensor that the update norm is measured with."""
LEAST_MOVEMENT = 1e-6
"""Relative change of the first batch's loss below which it has not moved."""


class UpdateMeter:
    """Size of the last update of each parameter group, relative to its weights.

    It compares evenly spaced values of each tensor, so that no second copy of a large model is needed; tensors of
    up to `SAMPLES` values count whole.

    Args:
        groups: optimiser groups with `name` and `params`.
        processes: the processes of the run.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], processes: Processes) -> None:
        self.processes = processes
        self.groups = {group["name"]: list(group["params"]) for group in groups}
        self._before: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Note the weights before an update."""
        self._before = {
            name: [_sample(x).clone() for x in params] for name, params in self.groups.items()
        }

    @torch.no_grad()
    def end(self) -> dict[str, float]:
        """Return by group: norm of the update since `begin`, over the norm of the weights before."""
        updates = {}
        for name, params in self.groups.items():
            sums = torch.zeros(2, dtype=torch.float64)
            for x, before in zip(params, self._before[name], strict=True):
                share = local_part(x)[0].numel() / max(1, before.numel())
                difference = (_sample(x).double() - before.double()).square().sum()
                sums += share * torch.stack([difference, before.double().square().sum()]).cpu()
            update, weights = self.processes.sum(sums).sqrt().tolist()
            # Weights that begin at zero have no relative update: the update itself tells.
            updates[name] = update / weights if weights else update
        self._before = {}
        return updates


def _sample(x: Tensor) -> Tensor:
    flat = local_part(x)[0].flatten()
    return flat[:: max(1, -(-flat.numel() // SAMPLES))]


class DensityMeter:
    """Realised density of sparse attention between two readings, from its own counts.

    Args:
        sla: the installed `SparseAttention`.
    """

    def __init__(self, sla: Any) -> None:
        self.sla = sla
        self._last: dict[str, tuple[Tensor, Tensor]] = {}

    def reset(self) -> None:
        """Leave out what was counted until now, such as a validation run."""
        for name, layer in self.sla.layers.items():
            self._last[name] = (layer.tally, layer.tally.clone())

    def read(self, processes: Processes) -> tuple[int, float | None]:
        """Return sparse calls since the last reading, and their density; None without any."""
        new = []
        for name, layer in self.sla.layers.items():
            last = self._last.get(name)
            if last is None or last[0] is not layer.tally:
                new.append(
                    layer.tally
                )  # counts of another run are another tensor, and begin at zero
            else:
                new.append(layer.tally - last[1])
        self.reset()
        total = torch.stack([x.cpu() for x in new]).sum(0).double()
        calls, attended, pairs = processes.sum(total).tolist()
        return int(calls), attended / pairs if pairs else None


class MovementGuard:
    """Ends a run in which nothing trains, with the reason.

    Args:
        scheduled: whether some layer may run sparse.
    """

    def __init__(self, *, scheduled: bool) -> None:
        self.scheduled = scheduled
        self._checked_updates = self._checked_density = False

    def check_updates(
        self, step: int, updates: Mapping[str, float], rates: Mapping[str, float]
    ) -> None:
        """Check the first update at a learning rate above zero.

        Args:
            step: index of the step, for the message.
            updates: as `UpdateMeter.end` returns them.
            rates: learning rate of each group in that update.

        Raises:
            RuntimeError: no group changed although it has a learning rate.
        """
        if self._checked_updates or not any(rates.values()):
            return
        self._checked_updates = True
        still = [name for name, x in updates.items() if rates[name] and not x]
        if len(still) == sum(1 for x in rates.values() if x):
            raise RuntimeError(
                f"nothing trains: step {step} changed no parameter of the groups {', '.join(still)}. Their gradients are "
                "zero or they do not take part in the loss"
            )
        for name in still:
            warnings.warn(
                f"the parameter group {name!r} does not train: step {step} changed none of its parameters",
                stacklevel=2,
            )

    def check_density(self, calls: int, reasons: Callable[[], Mapping[str, int]]) -> None:
        """Check the first step.

        Args:
            calls: sparse attention calls of the step.
            reasons: returns dense calls by reason.

        Raises:
            RuntimeError: every layer ran dense, so that the run would train dense attention.
        """
        if self._checked_density:
            return
        self._checked_density = True
        if calls or not self.scheduled:
            return
        why = ", ".join(f"{name} ({count} calls)" for name, count in reasons().items())
        raise RuntimeError(
            f"sla: no layer ran sparse in the first step ({why or 'attention was not called'}), so that dense attention "
            "would be trained; accepted with crossover='never', with longer samples, or with fewer dense_layers"
        )


def has_moved(first: float, now: float) -> bool:
    """Whether the loss of the same batch and noise has changed since the run began."""
    return not math.isclose(first, now, rel_tol=LEAST_MOVEMENT, abs_tol=0.0)
