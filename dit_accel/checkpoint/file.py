"""`sla.safetensors`: write and read the file of an SLA checkpoint without loading a model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.checkpoint.base_model import (
    FINGERPRINT,
    FINGERPRINT_VALUES,
    BaseModel,
    LayerGeometry,
)
from dit_accel.checkpoint.companion import Companion, companion_entry
from dit_accel.config import OFF, SLAConfig
from dit_accel.files import atomic_path
from dit_accel.runtime.components import TRANSFORMERS
from dit_accel.sla.attention import SparseLinearAttention
from dit_accel.tensor_files import digest, mismatch, open_safetensors

FILE_NAME = "sla.safetensors"
FORMAT = "dit_accel.sla"
FORMAT_VERSION, COMPANION_VERSION = "1", "2"
"""Format versions of files without and with a companion. Readers that know only version 1 must reject files with a
companion, because they would run sparse attention with the base weights."""
_HEADER = ("config", "layers", "transformer_class", "base_model", "base_revision", "digest")


@dataclass(frozen=True, eq=False, kw_only=True)
class SLACheckpoint:
    """Settings and weights of sparse attention for a base model. The weights are checked against the settings and layers."""

    config: SLAConfig
    """Settings of sparse attention."""
    base: BaseModel
    """Base model of the checkpoint."""
    weights: dict[str, Tensor]
    """Weights of sparse attention in fp32, by `<layer>.<parameter>`. Empty if the settings need no weights."""
    companion: Companion | None = None
    """Weights or adapters of the transformer trained with the checkpoint. Default: none, for the unchanged base model."""

    def __post_init__(self) -> None:
        self.config.check_layers(len(self.base.layers))
        found = {name: tuple(x.shape) for name, x in self.weights.items()}
        if problem := mismatch(found, self.weight_shapes()):
            raise ValueError(f"weights for combine={self.config.combine!r}: {problem}")
        for name, x in self.weights.items():
            if x.dtype != torch.float32 or not x.isfinite().all():
                raise ValueError(f"{name}: must hold finite fp32 values")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights that the settings need, by name."""
        layers = self.base.layers
        with torch.device("meta"):
            modules = {
                sizes: SparseLinearAttention(self.config, *sizes)
                for sizes in {(x.heads, x.head_dim) for x in layers}
            }
        return {
            f"{layer.name}.{name}": tuple(x.shape)
            for layer in layers
            for name, x in modules[layer.heads, layer.head_dim].state_dict().items()
        }

    def layer_weights(self) -> dict[str, dict[str, Tensor]]:
        """Return a state dict for each layer, or an empty dict without weights."""
        layers: dict[str, dict[str, Tensor]] = {}
        for layer in self.base.layers if self.weights else ():
            prefix = layer.name + "."
            layers[layer.name] = {
                name.removeprefix(prefix): x
                for name, x in self.weights.items()
                if name.startswith(prefix)
            }
        return layers


def write_checkpoint(path: str | os.PathLike, checkpoint: SLACheckpoint) -> None:
    """Write an SLA checkpoint to a file atomically."""
    base = checkpoint.base
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": json.dumps(checkpoint.config.to_dict(), sort_keys=True),
        "layers": json.dumps(base.layers),
        "transformer_class": base.transformer_class,
        "base_model": base.model,
        "base_revision": base.revision,
    }
    if checkpoint.companion is not None:
        header |= {
            "format_version": COMPANION_VERSION,
            "companion": checkpoint.companion.header_entry,
        }
    tensors = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, x in {**checkpoint.weights, FINGERPRINT: base.fingerprint}.items()
    }
    header["digest"] = digest(header, tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def read_checkpoint(path: str | os.PathLike) -> SLACheckpoint:
    """Read an SLA checkpoint, open its companion, and check both as far as possible without the model.

    Raises:
        ValueError: if the file or its companion is missing, damaged, inconsistent, or of another format or version.
    """
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format={header.get('format')!r}; expected an SLA checkpoint ({FORMAT!r})"
            )
        version = header.get("format_version")
        if version not in (FORMAT_VERSION, COMPANION_VERSION):
            raise ValueError(
                f"{path}: format_version={version!r}; this version of dit_accel reads {FORMAT_VERSION!r} and "
                f"{COMPANION_VERSION!r}"
            )
        expected = (*_HEADER, "companion") if version == COMPANION_VERSION else _HEADER
        if missing := [key for key in expected if key not in header]:
            raise ValueError(f"{path}: the header has no {missing[0]!r}")
        if version == FORMAT_VERSION and "companion" in header:
            raise ValueError(
                f"{path}: the header has a companion, which format_version={version!r} does not allow"
            )
        # Clone the tensors, because the file behind a memory map may change.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name, x in tensors.items():
        if x.dtype != torch.float32:
            raise ValueError(f"{path}: {name} is {x.dtype}; expected float32")
    if digest(header, tensors) != header["digest"]:
        raise ValueError(f"{path}: damaged or changed (its digest does not match)")
    try:
        layers = tuple(LayerGeometry(*_layer(x)) for x in json.loads(header["layers"]))
        shape = (len(layers), FINGERPRINT_VALUES)
        fingerprint = tensors.pop(FINGERPRINT, torch.empty(0))
        if tuple(fingerprint.shape) != shape:
            raise ValueError(f"{FINGERPRINT}: shape {tuple(fingerprint.shape)}; expected {shape}")
        base = BaseModel(
            transformer_class=header["transformer_class"],
            layers=layers,
            fingerprint=fingerprint,
            model=header["base_model"],
            revision=header["base_revision"],
        )
        values = json.loads(header["config"])
        if not isinstance(values, dict):
            raise ValueError(f"config: {values!r}; expected a mapping of fields of SLAConfig")
        config = SLAConfig.from_dict(values)
        companion = None
        if version == COMPANION_VERSION:
            companion = Companion.read(Path(path).parent, header["companion"])
        return SLACheckpoint(config=config, base=base, weights=tensors, companion=companion)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def companion_name(path: str | os.PathLike) -> str | None:
    """Return the name of the companion of an SLA checkpoint, or None if it has no companion.

    Raises:
        ValueError: if the file is not a safetensors file, or if the entry is invalid.
    """
    with open_safetensors(path) as file:
        entry = (file.metadata() or {}).get("companion")
    return None if entry is None else companion_entry(entry)["name"]


def component_files(folder: str | os.PathLike, file_name: str = FILE_NAME) -> dict[str, Path]:
    """Return the files named `file_name` in the subfolders `transformer` and `transformer_2`, by subfolder."""
    paths = {name: Path(folder) / name / file_name for name in TRANSFORMERS}
    return {name: path for name, path in paths.items() if path.is_file()}


def settings_of(sla: Any) -> Any:
    """Read the argument `sla` of the public functions.

    Args:
        sla: an `SLACheckpoint`; the path of an SLA checkpoint or of its folder; an `SLAConfig`, preset name, YAML file
            or dict (see `SLAConfig.load`); or a folder with one SLA checkpoint in each of the subfolders `transformer`
            and `transformer_2`. None and "none" disable sparse attention.

    Returns:
        An `SLAConfig` or `SLACheckpoint`, a dict of checkpoints by transformer for a folder with two checkpoints, or
        None if sparse attention is disabled.

    Raises:
        ValueError: if the argument has another form, or if a file cannot be read.
    """
    if sla is None or sla == OFF:
        return None
    if isinstance(sla, SLACheckpoint):
        return sla
    if isinstance(sla, str | os.PathLike) and sla not in SLAConfig.PRESETS:
        path = Path(sla)
        if path.is_dir():
            folder, path = path, path / FILE_NAME
            if not path.exists():
                if found := component_files(folder):
                    return {name: read_checkpoint(x) for name, x in found.items()}
                raise ValueError(f"sla={str(sla)!r}: the folder holds no {FILE_NAME}")
        if not path.exists() and (path.name != str(sla) or path.suffix):
            raise ValueError(
                f"sla={str(sla)!r}: no such file or folder; expected {', '.join(SLAConfig.PRESETS)}, none, a YAML file, a "
                f"{FILE_NAME} or its folder, an SLAConfig or a dict (use load_sla for a hub repository)"
            )
        if path.is_file() and path.suffix not in (".yaml", ".yml"):
            return read_checkpoint(path)
    return SLAConfig.load(sla)


def _layer(entry: Any) -> tuple[str, int, int, int]:
    good = isinstance(entry, list) and len(entry) == 4 and isinstance(entry[0], str)
    if not good or any(type(size) is not int for size in entry[1:]):
        raise ValueError(f"layers: {entry!r}; expected [name, heads, kv_heads, head_dim]")
    return tuple(entry)
