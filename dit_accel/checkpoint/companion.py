"""`Companion`: the fine-tuned weights or adapters of the transformer that an SLA checkpoint belongs to."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_accel.checkpoint.tensors import read_weights
from dit_accel.runtime.swap import Change, WeightSwap, plain_weights
from dit_accel.tensor_files import mismatch, open_safetensors

KINDS = ("weights", "lora")
DIGEST_VALUES = 16
_DESCRIBED = {"weights": "fine-tuned weights", "lora": "adapters"}
_ENTRIES = ("digest", "kind", "name")
LORA_METADATA = "lora_adapter_metadata"
"""Key in the header of a LoRA file of diffusers under which it has the settings of PEFT, as JSON."""
_PREFIX = "transformer."
"""Prefix of the keys in a LoRA file of diffusers that belong to the transformer."""
_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.weight")
_PLAIN_LORA = {"alpha_pattern": {}, "bias": "none", "lora_bias": False, "rank_pattern": {}, "use_dora": False,
               "use_rslora": False}  # fmt: skip
"""Settings of PEFT under which an adapter adds alpha / rank * B @ A to a weight, and nothing else."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Companion:
    """Values for the transformer that were trained together with an SLA checkpoint, in a file or folder beside it.

    Opened with `Companion.open`. Tensors are memory-mapped: reading them begins when they are used.
    """

    kind: Literal["weights", "lora"]
    """"weights": a state dict of the transformer. "lora": low-rank adapters in the format of diffusers."""
    path: Path
    """The file, or the folder that `save_pretrained` of the transformer wrote."""
    digest: str
    """Hash of names, shapes and some values of the tensors, see `digest_of`."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    scale: float = 1.0
    """alpha / rank of adapters."""

    @classmethod
    def open(cls, path: Path, kind: Any) -> "Companion":
        """Open a file or folder.

        Raises:
            ValueError: it is missing, damaged or holds something else.
        """
        tensors = read_weights(path, str(path))
        for name, x in tensors.items():
            if not x.is_floating_point():
                raise ValueError(f"{path}: {name} is {x.dtype}; accepted are floating-point values")
        scale, about = 1.0, ""
        if kind == "lora":
            with open_safetensors(path) as file:
                about = (file.metadata() or {}).get(LORA_METADATA, "")
            tensors, scale = _adapters(tensors, about, path)
        return cls(
            kind=kind, path=path, digest=digest_of(tensors, about), tensors=tensors, scale=scale
        )

    @classmethod
    def read(cls, folder: Path, entry: str) -> "Companion":
        """Open what the header of an SLA checkpoint names, and compare it with the digest there.

        Args:
            folder: folder of the SLA checkpoint.
            entry: `header_entry` of the companion.

        Raises:
            ValueError: the entry is not valid; or the companion is missing, damaged or another one.
        """
        named = companion_entry(entry)
        kind, path = named["kind"], folder / named["name"]
        if not path.exists():
            raise ValueError(
                f"its {_DESCRIBED[kind]} are not in {path}; accepted is the whole folder that dit-accel finetune wrote"
            )
        found = cls.open(path, kind)
        if found.digest != named["digest"]:
            raise ValueError(
                f"{path} does not hold the {_DESCRIBED[kind]} that this SLA checkpoint was trained with (digest does not "
                "match); accepted is the whole folder that dit-accel finetune wrote"
            )
        return found

    @property
    def header_entry(self) -> str:
        """JSON for the header of the SLA checkpoint beside it."""
        return json.dumps({"digest": self.digest, "kind": self.kind, "name": self.path.name})

    def swap(self) -> WeightSwap:
        """Return the values as other weights of a transformer."""
        return WeightSwap(self._changes, digest=self.digest)

    def _changes(self, transformer: nn.Module) -> dict[str, Change]:
        """Return the change of each weight.

        Raises:
            ValueError: names or shapes do not fit the transformer.
        """
        expected = {name: tuple(x.shape) for name, x in plain_weights(transformer)}
        if self.kind == "weights":
            found = {name: tuple(x.shape) for name, x in self.tensors.items()}
            changes = {name: _copy(x) for name, x in self.tensors.items()}
        else:
            pairs = _pairs(self.tensors)
            found = {f"{n}.weight": (b.shape[0], a.shape[1]) for n, (a, b) in pairs.items()}
            expected = {name: x for name, x in expected.items() if name in found}
            changes = {f"{n}.weight": _add(a, b, self.scale) for n, (a, b) in pairs.items()}
        if problem := mismatch(found, expected):
            raise ValueError(f"{self.path}: does not fit this transformer: {problem}")
        return changes


def companion_entry(entry: str) -> dict[str, str]:
    """Return the companion that the header of an SLA checkpoint names: its digest, kind and name.

    Raises:
        ValueError: the entry is not valid.
    """
    named = json.loads(entry)
    if not isinstance(named, dict) or sorted(named) != sorted(_ENTRIES):
        raise ValueError(f"companion: {entry:.60}; accepted: a mapping of {', '.join(_ENTRIES)}")
    kind, name = named["kind"], named["name"]
    if kind not in KINDS:
        raise ValueError(f"companion: kind={kind!r}; accepted are {', '.join(KINDS)}")
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"companion: name={name!r}; accepted is a file or folder beside it")
    return named


def digest_of(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Return the sha256 of names, shapes and `DIGEST_VALUES` evenly spaced values of each tensor, as fp32.

    It reads little of a large file. It tells another file and a damaged one, not every changed byte.

    Args:
        about: further text that counts.
    """
    state = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().flatten()
        state.update(json.dumps([name, list(tensors[name].shape)]).encode())
        places = torch.arange(min(DIGEST_VALUES, x.numel())) * x.numel() // DIGEST_VALUES
        state.update(x[places].float().numpy().tobytes())
    return state.hexdigest()


def _adapters(
    tensors: Mapping[str, Tensor], about: str, path: Path
) -> tuple[dict[str, Tensor], float]:
    """Return the adapters of the transformer, without prefix, and their scale."""
    accepted = "accepted are adapters as dit-accel finetune writes them"
    try:
        settings = {k.removeprefix(_PREFIX): x for k, x in json.loads(about).items()}
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: no rank and alpha of adapters in {LORA_METADATA}; {accepted}"
        ) from None
    for name, plain in _PLAIN_LORA.items():
        if settings.get(name, plain) != plain:
            raise ValueError(f"{path}: {name}={settings[name]!r}; {accepted}")
    own = {k.removeprefix(_PREFIX): x for k, x in tensors.items() if k.startswith(_PREFIX)}
    for name in tensors:
        if not name.startswith(_PREFIX) or not _ADAPTER.fullmatch(name):
            raise ValueError(f"{path}: {name} is no adapter of a linear layer; {accepted}")
    for name, (a, b) in _pairs(own).items():
        good = a is not None and b is not None and a.ndim == b.ndim == 2
        if not good or not a.shape[0] == b.shape[1] == rank:
            raise ValueError(
                f"{path}: adapter of {name} without A and B of rank {rank}; {accepted}"
            )
    if not own:
        raise ValueError(f"{path}: no adapters; {accepted}")
    return own, alpha / rank


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """Return A and B of each adapted module; None where one is missing."""
    modules = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in tensors)
    return {
        module: (
            tensors.get(f"{module}.lora_A.weight"),
            tensors.get(f"{module}.lora_B.weight"),
        )
        for module in modules
    }


def _copy(x: Tensor) -> Change:
    """Return a change to this value, copied, because its file may change under the memory map."""
    return lambda old: torch.empty_like(old).copy_(x)


def _add(a: Tensor, b: Tensor, scale: float) -> Change:
    """Return the change W + scale * B @ A, computed in fp32."""

    def changed(old: Tensor) -> Tensor:
        product = b.to(old.device, torch.float32) @ a.to(old.device, torch.float32)
        return torch.add(old.float(), product, alpha=scale).to(old.dtype)

    return changed
