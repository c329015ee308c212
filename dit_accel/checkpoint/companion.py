"""`Companion`: fine-tuned weights or adapters of the transformer that were trained together with an SLA checkpoint."""

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
"""Number of values of each tensor that the digest covers."""
_DESCRIBED = {"weights": "fine-tuned weights", "lora": "adapters"}
_ENTRIES = ("digest", "kind", "name")
LORA_METADATA = "lora_adapter_metadata"
"""Key of the PEFT settings (JSON) in the header of a LoRA file of diffusers."""
_PREFIX = "transformer."
"""Prefix of the transformer's keys in a LoRA file of diffusers."""
_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.weight")
_PLAIN_LORA = {"alpha_pattern": {}, "bias": "none", "lora_bias": False, "rank_pattern": {}, "use_dora": False,
               "use_rslora": False}  # fmt: skip
"""PEFT settings of a plain adapter, which only adds alpha / rank * B @ A to a weight."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Companion:
    """Weights or adapters of the transformer, in a file or folder next to the SLA checkpoint.

    Open a companion with `Companion.open`. Tensors are memory-mapped and read when they are used.
    """

    kind: Literal["weights", "lora"]
    """Kind of the tensors. "weights": a state dict of the transformer. "lora": low-rank adapters in the format of diffusers."""
    path: Path
    """Path of the file, or of the folder that `save_pretrained` of the transformer wrote."""
    digest: str
    """Hash of the names, shapes and some values of the tensors, see `digest_of`."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Tensors by name."""
    scale: float = 1.0
    """Scale of adapters: alpha / rank."""

    @classmethod
    def open(cls, path: Path, kind: Any) -> "Companion":
        """Open a file or folder.

        Args:
            path: file or folder with the tensors.
            kind: "weights" or "lora".

        Raises:
            ValueError: if the file is missing or damaged, or if it holds other data.
        """
        tensors = read_weights(path, str(path))
        for name, x in tensors.items():
            if not x.is_floating_point():
                raise ValueError(f"{path}: {name} is {x.dtype}; expected a floating-point dtype")
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
        """Open the companion that the header of an SLA checkpoint names, and check its digest.

        Args:
            folder: folder of the SLA checkpoint.
            entry: `header_entry` of the companion.

        Raises:
            ValueError: if the entry is invalid, or if the companion is missing, damaged or of another run.
        """
        named = companion_entry(entry)
        kind, path = named["kind"], folder / named["name"]
        if not path.exists():
            raise ValueError(
                f"its {_DESCRIBED[kind]} are missing: {path}; expected the complete folder that dit-accel finetune wrote"
            )
        found = cls.open(path, kind)
        if found.digest != named["digest"]:
            raise ValueError(
                f"{path} does not hold the {_DESCRIBED[kind]} that this SLA checkpoint was trained with (its digest does not "
                "match); expected the complete folder that dit-accel finetune wrote"
            )
        return found

    @property
    def header_entry(self) -> str:
        """JSON entry for the header of the SLA checkpoint."""
        return json.dumps({"digest": self.digest, "kind": self.kind, "name": self.path.name})

    def swap(self) -> WeightSwap:
        """Return a `WeightSwap` that puts these weights or adapters into a transformer."""
        return WeightSwap(self._changes, digest=self.digest)

    def _changes(self, transformer: nn.Module) -> dict[str, Change]:
        """Return the change of each weight of a transformer.

        Raises:
            ValueError: if names or shapes do not fit the transformer.
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
    """Parse the companion entry in the header of an SLA checkpoint: digest, kind and name.

    Raises:
        ValueError: if the entry is invalid.
    """
    named = json.loads(entry)
    if not isinstance(named, dict) or sorted(named) != sorted(_ENTRIES):
        raise ValueError(f"companion: {entry:.60}; expected a mapping of {', '.join(_ENTRIES)}")
    kind, name = named["kind"], named["name"]
    if kind not in KINDS:
        raise ValueError(f"companion: kind={kind!r}; expected {' or '.join(KINDS)}")
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(
            f"companion: name={name!r}; expected the name of a file or folder in the same folder"
        )
    return named


def digest_of(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Return the sha256 of the name, shape and `DIGEST_VALUES` evenly spaced fp32 values of each tensor.

    The digest reads only a small part of a large file. It detects other files and most damage, but not every changed
    byte.

    Args:
        tensors: tensors by name.
        about: additional text to include in the digest.
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
    """Return the adapters of the transformer without their prefix, and their scale."""
    expected = "expected adapters written by dit-accel finetune"
    try:
        settings = {k.removeprefix(_PREFIX): x for k, x in json.loads(about).items()}
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: no rank and alpha of adapters in {LORA_METADATA}; {expected}"
        ) from None
    for name, plain in _PLAIN_LORA.items():
        if settings.get(name, plain) != plain:
            raise ValueError(f"{path}: {name}={settings[name]!r}; {expected}")
    own = {k.removeprefix(_PREFIX): x for k, x in tensors.items() if k.startswith(_PREFIX)}
    for name in tensors:
        if not name.startswith(_PREFIX) or not _ADAPTER.fullmatch(name):
            raise ValueError(f"{path}: {name} is not an adapter of a linear layer; {expected}")
    for name, (a, b) in _pairs(own).items():
        good = a is not None and b is not None and a.ndim == b.ndim == 2
        if not good or not a.shape[0] == b.shape[1] == rank:
            raise ValueError(
                f"{path}: the adapter of {name} lacks A and B of rank {rank}; {expected}"
            )
    if not own:
        raise ValueError(f"{path}: holds no adapters; {expected}")
    return own, alpha / rank


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """Return matrices A and B of each adapted module; None for a missing matrix."""
    modules = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in tensors)
    return {
        module: (
            tensors.get(f"{module}.lora_A.weight"),
            tensors.get(f"{module}.lora_B.weight"),
        )
        for module in modules
    }


def _copy(x: Tensor) -> Change:
    """Return a change that replaces a weight by a copy of `x`. The file behind `x` may change later."""
    return lambda old: torch.empty_like(old).copy_(x)


def _add(a: Tensor, b: Tensor, scale: float) -> Change:
    """Return the change of a weight W to W + scale * B @ A, computed in fp32."""

    def changed(old: Tensor) -> Tensor:
        product = b.to(old.device, torch.float32) @ a.to(old.device, torch.float32)
        return torch.add(old.float(), product, alpha=scale).to(old.dtype)

    return changed
