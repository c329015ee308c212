"""`ModelFile`: safetensors file with tensors for the KV cache of one model, and checks that it fits a model."""

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
"""Key of the JSON metadata in the safetensors header."""
FINGERPRINT = "fingerprint"
VALUES = 64
"""Number of weights per layer in a fingerprint."""
LEAST_SIMILARITY = 0.9
"""Smallest cosine similarity of two fingerprints of the same model. Other dtypes and light fine-tuning stay far above it;
different models are near 0."""


@dataclass(frozen=True, eq=False)
class ModelFile:
    """Tensors that were made for one model."""

    kind: str
    """Kind of the content, such as "channel mask"."""
    tensors: Mapping[str, Tensor]
    sizes: ModelSizes
    fingerprint: Tensor
    """Fingerprint of the model weights, see `fingerprint_of`."""
    model: str = ""
    """Name of the model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further metadata as plain values."""

    def save(self, path: Path, *, hashed: bool = True) -> None:
        """Write the file. If writing fails, an existing file is left unchanged.

        Args:
            path: path of the file.
            hashed: also write a hash of the content, so that reading detects damage.
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
        """Check that the file was made for a model with these weights. Layers with quantised weights are not checked.

        Args:
            argument: argument that the error names.
            found: fingerprint of the model, see `fingerprint_of`.

        Raises:
            ValueError: the weights differ.
        """
        a, b = self.fingerprint.double(), found.double()
        known = a.any(1) & b.any(1) if a.shape == b.shape else torch.zeros(0, dtype=torch.bool)
        if known.any():
            a, b = a[known].flatten(), b[known].flatten()
            alike = float(a @ b / (a.norm() * b.norm()))
            if alike < LEAST_SIMILARITY:
                raise ValueError(
                    f"{argument}: made for {self.model or 'another model'}; the similarity of the weights is {alike:.2f}, "
                    f"must be at least {LEAST_SIMILARITY}"
                )


def load_model_file(path: str | Path, kind: str, argument: str) -> ModelFile:
    """Read a file.

    Args:
        path: path of the file.
        kind: expected kind of the content.
        argument: argument that errors name.

    Raises:
        ValueError: the file is missing, damaged, or has another kind or version.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise ValueError(f"{argument}={str(path)!r}: no such file; must be a file with a {kind}")
    try:
        return _load(place, kind)
    except (OSError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{argument}={str(path)!r}: is not a file with a {kind} ({error})"
        ) from None


def read_model_file(
    path: str | Path, kind: str, sizes: ModelSizes, argument: str, *, keep: bool = True
) -> ModelFile:
    """Read a file and check that it fits the sizes of a model.

    Args:
        path: path of the file.
        kind: expected kind of the content.
        sizes: sizes of the model.
        argument: argument that errors name.
        keep: cache the content in memory, so that all layers of a model share it.

    Raises:
        ValueError: the file is missing, damaged, has another kind or version, or was made for a model of other sizes.
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
                    f"{argument}={str(path)!r}: made for a model with {name}={mine}; must be {name}={other} for this model"
                )
        raise ValueError(
            f"{argument}={str(path)!r}: made for another model of the same sizes; must be a file of this model"
        )
    return found


@lru_cache(maxsize=8)
def _kept(path: str, changed: int, size: int, kind: str, argument: str) -> ModelFile:
    """Call `load_model_file` once per version of a file, identified by its time and size."""
    return load_model_file(path, kind, argument)


def _load(path: Path, kind: str) -> ModelFile:
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        if ENTRY not in header:
            raise ValueError("not written by dit_accel")
        entry = json.loads(header[ENTRY])
        if entry["kind"] != kind:
            raise ValueError(f"its kind is {entry['kind']!r}")
        if entry["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format_version={entry['format_version']!r}; this dit_accel reads {FORMAT_VERSION}"
            )
        # Clone, because the file may change while it is memory-mapped.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if "digest" in header and digest(header, tensors) != header["digest"]:
        raise ValueError("damaged or changed after it was written (digest does not match)")
    fingerprint = tensors.pop(FINGERPRINT)
    sizes = ModelSizes(**entry["sizes"])
    return ModelFile(kind, tensors, sizes, fingerprint, entry["model"], entry["settings"])


def fingerprint_of(layers: Sequence[nn.Module]) -> Tensor:
    """Return a sample of the weights of each attention layer, `[layers, VALUES]` in fp32; zeros if they are not readable.

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
    """Return a copy on the CPU that shares no memory, because safetensors does not save views of shared memory."""
    x = x.detach().contiguous().cpu()
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
