"""`TrainingState`: everything that training steps change and checkpoints store."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.finetune.checkpoints import Checkpoint
from dit_accel.finetune.shards import ShardReader, is_sharded, local_part


@dataclass
class TrainingState:
    """Trained parameters with their optimiser, schedule and moving average, and the counters of the run.

    Batches and noise are functions of the seed and the step, so a checkpoint needs nothing else.
    """

    named: dict[str, nn.Parameter]
    """Trained parameters in fp32 by name, in a fixed order."""
    optimizer: torch.optim.Optimizer
    """Optimiser without the wrapper of accelerate."""
    scheduler: Any
    """Learning-rate schedule of diffusers (`get_scheduler`)."""
    ema: Any = None
    """Moving average of the trained parameters (`EMAModel`); None without `use_ema`."""
    scaler: Any = None
    """Gradient scaler; None unless the precision is fp16."""
    counters: dict[str, Any] = field(default_factory=dict)
    """Counters as plain values: skipped steps, seconds, first loss, ..."""

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors to store in a checkpoint, by group and name."""
        tensors: dict[str, Tensor] = {}
        for name, values in self._optimizer_state().items():
            tensors |= {f"{name}/{key}": x for key, x in values.items() if isinstance(x, Tensor)}
        groups: dict[str, dict[str, Tensor]] = {"weights": dict(self.named), "optimizer": tensors}
        if self.ema is not None:
            groups["ema"] = dict(zip(self.named, self.ema.shadow_params, strict=True))
        return groups

    def numbers(self) -> dict[str, Any]:
        """Return the plain values to store in a checkpoint."""
        own: dict[str, dict[str, Any]] = {}
        for name, values in self._optimizer_state().items():
            if plain := {key: x for key, x in values.items() if not isinstance(x, Tensor)}:
                own[name] = plain
        return {
            "counters": self.counters,
            "scheduler": _plain(self.scheduler.state_dict()),
            "optimizer": {
                "groups": [_plain(x) for x in self.optimizer.state_dict()["param_groups"]],
                "numbers": own,
            },
            "ema": None if self.ema is None else {"steps": self.ema.optimization_step},
            "scaler": None if self.scaler is None else _plain(self.scaler.state_dict()),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the state from a checkpoint. Any number of processes may have written it.

        Raises:
            ValueError: if the checkpoint has other tensors than this run.
        """
        numbers = checkpoint.state["numbers"]
        with checkpoint.reader("weights") as reader:
            _fill(reader, self.named, f"{checkpoint.path}: weights")
        if self.ema is not None:
            shadows = dict(zip(self.named, self.ema.shadow_params, strict=True))
            with checkpoint.reader("ema") as reader:
                _fill(reader, shadows, f"{checkpoint.path}: ema")
            self.ema.optimization_step = numbers["ema"]["steps"]
        with checkpoint.reader("optimizer") as reader:
            self._load_optimizer(reader, numbers["optimizer"])
        # Checkpoints do not store the schedule functions. `get_scheduler` has created them from the settings.
        lambdas = [None] * len(self.optimizer.param_groups)
        self.scheduler.load_state_dict({**numbers["scheduler"], "lr_lambdas": lambdas})
        if self.scaler is not None:
            self.scaler.load_state_dict(numbers["scaler"])
        self.counters.update(numbers["counters"])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager in which the parameters hold their moving averages, if there are any."""
        if self.ema is None:
            yield
            return
        with torch.no_grad():
            kept = [x.detach().clone() for x in self.named.values()]
            self.ema.copy_to(self.named.values())
        try:
            yield
        finally:
            with torch.no_grad():
                for x, before in zip(self.named.values(), kept, strict=True):
                    x.copy_(before)

    def _names(self) -> list[str]:
        """Return the parameter names in the order of the indices in the optimiser state."""
        names = {id(x): name for name, x in self.named.items()}
        return [names[id(x)] for group in self.optimizer.param_groups for x in group["params"]]

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        state, names = self.optimizer.state_dict()["state"], self._names()
        return {names[index]: values for index, values in state.items()}

    def _load_optimizer(self, reader: ShardReader, numbers: dict[str, Any]) -> None:
        names = self._names()
        index = {name: i for i, name in enumerate(names)}
        state: dict[int, dict[str, Any]] = {}
        for name, plain in numbers["numbers"].items():
            state.setdefault(index[name], {}).update(plain)
        for full in reader.names:
            name, key = full.rsplit("/", 1)
            if name not in index:
                raise ValueError(f"optimizer: this run does not train {name}")
            state.setdefault(index[name], {})[key] = self._like(reader, full, self.named[name])
        groups = self.optimizer.state_dict()["param_groups"]
        if len(groups) != len(numbers["groups"]):
            raise ValueError(
                f"optimizer: the checkpoint has {len(numbers['groups'])} groups, but this run has {len(groups)}"
            )
        for group, saved in zip(groups, numbers["groups"], strict=True):
            group |= {
                key: tuple(x) if isinstance(group.get(key), tuple) else x
                for key, x in saved.items()
            }
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @staticmethod
    def _like(reader: ShardReader, name: str, parameter: Tensor) -> Tensor:
        """Read a tensor of the optimiser state. Shard it like the parameter if the shapes are equal."""
        if not is_sharded(parameter) or reader.shape(name) != tuple(parameter.shape):
            return reader.read(name)
        made = torch.zeros_like(parameter)
        local_part(made)[0].copy_(reader.read(name, like=parameter))
        return made


@torch.no_grad()
def _fill(reader: ShardReader, tensors: dict[str, Any], where: str) -> None:
    """Copy the tensors of a reader into `tensors`. Names and shapes must be equal."""
    missing, extra = tensors.keys() - set(reader.names), set(reader.names) - tensors.keys()
    if missing or extra:
        name, what = (min(missing), "is missing") if missing else (min(extra), "is not expected")
        raise ValueError(
            f"{where}: {name} {what}; the checkpoint belongs to another model or another run"
        )
    for name, x in tensors.items():
        if reader.shape(name) != tuple(x.shape):
            raise ValueError(
                f"{where}: {name} has shape {reader.shape(name)}; expected {tuple(x.shape)}"
            )
        local_part(x)[0].copy_(reader.read(name, like=x))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that JSON can store, without parameters and functions."""
    kinds = bool | int | float | str | None

    def good(x: Any) -> bool:
        return all(map(good, x)) if isinstance(x, list | tuple) else isinstance(x, kinds)

    return {key: x for key, x in values.items() if key not in ("params", "lr_lambdas") and good(x)}
