"""`NonFiniteGuard`: skip steps with a non-finite loss or gradient, and end the run after too many of them."""

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
"""Number of parameters that a dump names at most."""


class NonFiniteError(RuntimeError):
    """Error raised after too many steps with a non-finite loss or gradient."""


@dataclass
class StepFacts:
    """Facts about the micro-batches of one step in one process, for the dump."""

    ids: list[str] = field(default_factory=list)
    """Names of the samples."""
    losses: list[float] = field(default_factory=list)
    """Loss of each micro-batch."""
    noise_levels: list[float] = field(default_factory=list)
    """Noise level of each sample."""


class NonFiniteGuard:
    """Decide whether a step may change the weights. All processes reach the same decision.

    A step with a non-finite loss or gradient changes no weight. It is counted, and the run continues with the next
    batch. After more than `most` such steps the run ends and writes a dump.

    Args:
        folder: folder for the dump.
        most: number of steps that may be skipped over the whole run, >= 0.
        processes: processes of the run.
        counters: counters of the run. The guard stores `skipped_steps` and `overflows` there.
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
        """Return True if the step must not change the weights.

        Args:
            step: index of the optimiser step.
            loss: mean loss over all processes.
            finite: True if the losses of all processes are finite. The same value in all processes.
            gradient_norm: norm of all gradients over all processes.
            facts: facts about the step in this process.
            groups: optimiser groups with `name` and `params`, for the dump.
            named: trained tensors by name, for the dump.
            loss_scale: loss scale of fp16. Overflows under a scale above 1 are expected, and are counted as
                `overflows` instead.

        Raises:
            NonFiniteError: in every process, if more than `most` steps have been skipped.
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
                f"loss or gradient was not finite in {len(self.counters['skipped_steps'])} steps, more than "
                f"max_nonfinite={self.most}. Last step: {step} (loss {loss}, gradient norm {gradient_norm}). {path} lists the "
                "batch, noise levels and norms. Try a lower learning_rate or max_grad_norm, mixed_precision='bf16', or other "
                "data"
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
    """Return the joint norm of tensors over all processes. None counts as zero."""
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
    """Return the value with non-finite floats replaced by "nan", "inf" and "-inf", which JSON can store."""
    if isinstance(value, dict):
        return {key: jsonable(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
