"""`ModelFile`: what was learned from one model for its caches, as a safetensors file that knows the model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_accel.files import atomic_path
from dit_accel.llm.kvcache.store import ModelSizes
from dit_accel.tensor_files import digest, open_safetensors

FORMAT_VERSION = 1
ENTRY = "dit_accel"
"""Key of the JSON in the header of a file."""
FINGERPRINT = "fingerprint"
VALUES = 64
"""Weights of each layer in a fingerprint."""
LEAST_SIMILARITY = 0.9
"""Least cosine of two fingerprints of one model. Other dtypes and small changes stay far above it; others are near 0."""


@dataclass(frozen=True, eq=False)
class ModelFile:
    """Tensors for one model."""

    kind: str
    """Word for what the tensors are."""
    tensors: Mapping[str, Tensor]
    sizes: ModelSizes
    fingerprint: Tensor
    """See `fingerprint_of`."""
    model: str = ""
    """Name of the model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Plain values."""

    def save(self, path: Path, *, hashed: bool = True) -> None:
        """Write the file; what stood there stays if that fails.

        Args:
            path: name of the file.
            hashed: also write a hash of all it holds, so that damage is found when it is read.
        """
        entry = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "model": self.model,
            "sizes": asdict(self.sizes),
            "settings": dict(self.settings),
        }
        tensors = {k: _alone(x) for k, x in {**self.tensors, FINGERPRINT: self.fingerprint}.items()}
        header = {ENTRY: json.dumps(entry)}
        if hashed:
            header["digest"] = digest(header, tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    def check_weights(self, argument: str, found: Tensor) -> None:
        """Check that a model has the weights that this was made for; nothing is known of quantised ones.

        Raises:
            ValueError: it has other weights.
        """
        a, b = self.fingerprint.double(), found.double()
        known = a.any(1) & b.any(1) if a.shape == b.shape else torch.zeros(0, dtype=torch.bool)
        if known.any():
            a, b = a[known].flatten(), b[known].flatten()
            alike = float(a @ b / (a.norm() * b.norm()))
            if alike < LEAST_SIMILARITY:
                raise ValueError(
                    f"{argument}: made for {self.model or 'another model'}, similarity of the weights {alike:.2f}; "
                    f"accepted from {LEAST_SIMILARITY}"
                )


def load_model_file(path: str | Path, kind: str, argument: str) -> ModelFile:
    """Return what a file holds.

    Args:
        path: the file.
        kind: what it must be.
        argument: name of the setting, for messages.

    Raises:
        ValueError: no such file, or it is damaged, or of another kind or version.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise ValueError(
            f"{argument}={str(path)!r}: no such file; accepted is a file with a {kind}"
        )
    try:
        return _load(place, kind)
    except (OSError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{argument}={str(path)!r}: is no file with a {kind} ({error})") from None


def read_model_file(
    path: str | Path, kind: str, sizes: ModelSizes, argument: str, *, keep: bool = True
) -> ModelFile:
    """Return what a file holds.

    Args:
        path: the file.
        kind: what it must be.
        sizes: sizes of the model that it is for.
        argument: name of the setting, for messages.
        keep: whether to read it once for all layers of a model.

    Raises:
        ValueError: no such file, a file of another kind or version, or one for a model of other sizes.
    """
    place = Path(path).expanduser()
    if keep and place.is_file():
        state = place.stat()
        found = _kept(str(place), state.st_mtime_ns, state.st_size, kind, argument)
    else:
        found = load_model_file(path, kind, argument)
    if found.sizes != sizes:
        for name in ("layers", "kv_heads", "head_dim"):
            mine, other = getattr(found.sizes, name), getattr(sizes, name)
            if mine != other:
                raise ValueError(
                    f"{argument}={str(path)!r}: made for a model with {name}={mine}; accepted for this model is {other}"
                )
        raise ValueError(
            f"{argument}={str(path)!r}: made for another model of the same sizes; accepted is a file of this one"
        )
    return found


@lru_cache(maxsize=8)
def _kept(path: str, changed: int, size: int, kind: str, argument: str) -> ModelFile:
    """Read a file once for all layers."""
    return load_model_file(path, kind, argument)


def _load(path: Path, kind: str) -> ModelFile:
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        if ENTRY not in header:
            raise ValueError("it was not made here")
        entry = json.loads(header[ENTRY])
        if entry["kind"] != kind:
            raise ValueError(f"its kind is {entry['kind']!r}")
        if entry["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format_version={entry['format_version']!r}; this dit_accel reads {FORMAT_VERSION}"
            )
        # Copies: the file may change under a memory map.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if "digest" in header and digest(header, tensors) != header["digest"]:
        raise ValueError("damaged or changed after it was written (digest does not match)")
    fingerprint = tensors.pop(FINGERPRINT)
    sizes = ModelSizes(**entry["sizes"])
    return ModelFile(kind, tensors, sizes, fingerprint, entry["model"], entry["settings"])


def fingerprint_of(layers: Sequence[nn.Module]) -> Tensor:
    """Return some weights of each attention layer `[layers, VALUES]`, fp32; zeros where there are none to read.

    Args:
        layers: attention layers of a model.
    """
    rows = []
    for layer in layers:
        weight = next(
            (x for x in layer.parameters() if x.ndim == 2 and x.is_floating_point()), None
        )
        row = torch.zeros(VALUES)
        if weight is not None and not weight.is_meta:
            some = weight.detach().flatten()
            some = some[:: max(1, some.numel() // VALUES)][:VALUES].float().cpu()
            row[: len(some)] = some
        rows.append(row)
    return torch.stack(rows)


def _alone(x: Tensor) -> Tensor:
    """Return a tensor on the CPU that shares no memory: safetensors refuses those that do."""
    x = x.detach().contiguous().cpu()
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
