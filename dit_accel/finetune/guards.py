"""`NonFiniteGuard`: steps whose loss or gradient is not finite are skipped, counted and, at last, fatal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.files import write_json
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.shards import is_sharded, local_part

MOST_NAMES = 20
"""Parameters that a dump names."""


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or a gradient that is not finite."""


@dataclass
class StepFacts:
    """What a process knows about the micro-batches of a step, for the dump."""

    ids: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    noise_levels: list[float] = field(default_factory=list)


class NonFiniteGuard:
    """Decides in all processes alike whether a step counts.

    A value that is not finite is never replaced: the step changes no weight, the run counts it, and
    goes on with the next batch. After more than `most` such steps the run ends with a dump.

    Args:
        folder: where the dump is written.
        most: steps that may be skipped over the whole run, >= 0.
        processes: the processes of the run.
        counters: of the run; `skipped_steps` and `overflows` are kept there.
    """

    def __init__(
        self, folder: Path, most: int, processes: Processes, counters: dict[str, Any]
    ) -> None:
        self.folder, self.most, self.processes, self.counters = folder, most, processes, counters
        counters.setdefault("skipped_steps", [])
        counters.setdefault("overflows", 0)

    def skips(
        self,
        step: int,
        *,
        loss: float,
        finite: bool,
        gradient_norm: float,
        facts: StepFacts,
        groups: Sequence[Mapping[str, Any]],
        named: Mapping[str, Tensor],
        loss_scale: float | None = None,
    ) -> bool:
        """Return whether the step must not change the weights.

        Args:
            step: index of the optimiser step.
            loss: mean over all processes.
            finite: whether the losses of all processes are finite; all processes have agreed on it.
            gradient_norm: of all trained tensors, over all processes.
            facts: of this process.
            groups: optimiser groups, with `name` and `params`, for the dump.
            named: trained tensors by name, for the dump.
            loss_scale: of fp16; a gradient that overflows under a large scale is no fault, and is counted apart.

        Raises:
            NonFiniteError: in every process, once more than `most` steps were skipped.
        """
        if finite and math.isfinite(gradient_norm):
            return False
        if finite and loss_scale is not None and loss_scale > 1:
            self.counters["overflows"] += 1
            return True
        self.counters["skipped_steps"].append(step)
        if len(self.counters["skipped_steps"]) > self.most:
            path = self._dump(step, loss, gradient_norm, facts, groups, named)
            raise NonFiniteError(
                f"loss or gradient not finite in {len(self.counters['skipped_steps'])} steps, the last one {step} "
                f"(loss {loss}, gradient norm {gradient_norm}); max_nonfinite={self.most}. {path} has the batch, the noise "
                "levels and the norms. A lower learning_rate or max_grad_norm, mixed_precision='bf16', or other data may help"
            )
        return True

    def _dump(
        self,
        step: int,
        loss: float,
        gradient_norm: float,
        facts: StepFacts,
        groups: Sequence[Mapping[str, Any]],
        named: Mapping[str, Tensor],
    ) -> Path:
        path = self.folder / f"nonfinite-{step}.json"
        found = self.processes.gather(asdict(facts))
        norms = {
            group["name"]: {
                "weights": group_norm(group["params"], self.processes),
                "gradients": group_norm([x.grad for x in group["params"]], self.processes),
                "learning_rate": group["lr"],
            }
            for group in groups
        }
        bad = [name for name, x in named.items() if not _finite(x) or not _finite(x.grad)]
        if self.processes.is_main:
            record = {
                "format_version": 1,
                "step": step,
                "loss": loss,
                "gradient_norm": gradient_norm,
                "skipped_steps": self.counters["skipped_steps"],
                "processes": found,
                "groups": norms,
                "not_finite": bad[:MOST_NAMES],
                "not_finite_count": len(bad),
            }
            write_json(path, jsonable(record))
        return path


@torch.no_grad()
def group_norm(tensors: Sequence[Tensor | None], processes: Processes) -> float:
    """Return the norm of tensors together; those that are None count as zero."""
    total = torch.zeros((), dtype=torch.float64)
    whole = torch.zeros((), dtype=torch.float64)
    for x in tensors:
        if x is None:
            continue
        square = local_part(x)[0].double().square().sum().cpu()
        if is_sharded(x):
            total += square
        else:
            whole += square
    return float((processes.sum(total) + whole).sqrt())


def _finite(x: Tensor | None) -> bool:
    return x is None or bool(local_part(x)[0].isfinite().all())


def jsonable(value: Any) -> Any:
    """Return the value with the names of numbers that JSON does not have: "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {key: jsonable(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
