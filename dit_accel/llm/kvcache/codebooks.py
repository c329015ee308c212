"""`Codebooks`: product-quantisation codebooks, written by `dit-accel llm calibrate` and read by the store "pq"."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.config.base import check, check_choice, is_int
from dit_accel.llm.kvcache.model_file import VALUES, ModelFile, load_model_file
from dit_accel.llm.kvcache.packing import values_per_word
from dit_accel.llm.kvcache.quantizer import Quantizer
from dit_accel.llm.kvcache.rotation import Rotation
from dit_accel.llm.kvcache.store import ModelSizes
from dit_accel.tensor_files import mismatch

KIND = "set of codebooks"
SCOPES = ("model", "layer", "head")
PAIRINGS = ("neighbours", "planes")
ROPES = ("after", "before")
LARGEST = 8192
"""Largest number of layers, heads or channels that is accepted from a file."""


@dataclass(frozen=True, kw_only=True)
class CodebookForm:
    """CodebookForm of codebooks: sub-vectors, bits per code, and which vectors share codebooks."""

    sub_vectors: int
    """Number of sub-vectors of a key or value."""
    bits: int
    """Bits per code, 2 to 8."""
    scope: str = "layer"
    """Scope of a codebook: the whole "model", a "layer" or a "head"."""
    pairing: str = "neighbours"
    """Key channels in one sub-vector: "neighbours", or "planes" (channels i and i + d / 2, which RoPE rotates together)."""
    centred: bool = False
    """Subtract the mean of each head before coding."""
    rope: str = "after"
    """Code keys "after" RoPE, as in the paper, or "before" it (needs the pairing "planes"). Keys before RoPE do not depend on
    the position. Their positions are stored too, and keys are rotated when they are read."""

    def __post_init__(self) -> None:
        ok = is_int(self.sub_vectors) and self.sub_vectors >= 1
        check("sub_vectors", self.sub_vectors, ok, "an int >= 1")
        check("bits", self.bits, is_int(self.bits) and 2 <= self.bits <= 8, "an int from 2 to 8")
        check_choice("scope", self.scope, SCOPES)
        check_choice("pairing", self.pairing, PAIRINGS)
        check_choice("rope", self.rope, ROPES)
        if self.rope == "before" and self.pairing != "planes":
            raise ValueError(f"pairing={self.pairing!r}: must be 'planes' with rope='before'")
        check("centred", self.centred, isinstance(self.centred, bool), "true or false")

    def check_head_dim(self, head_dim: int) -> None:
        """Check that heads can be divided into the sub-vectors, and that the codes of a vector fill whole bytes.

        Raises:
            ValueError: one of the two does not hold.
        """
        multiple = values_per_word(self.bits)
        if head_dim % self.sub_vectors or self.sub_vectors % multiple:
            raise ValueError(
                f"sub_vectors={self.sub_vectors}: must be a divisor of head_dim={head_dim} and a multiple of {multiple} for "
                f"codes of {self.bits} bits"
            )
        if self.pairing == "planes" and (head_dim // self.sub_vectors) % 2:
            raise ValueError(
                f"sub_vectors={self.sub_vectors}: sub-vectors have {head_dim // self.sub_vectors} channels; must be an even number "
                "with pairing='planes'"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebooks:
    """Codebooks for the keys and values of one model. The shapes of the tensors are checked."""

    form: CodebookForm
    sizes: ModelSizes
    """Sizes of the model."""
    layers: tuple[int, ...]
    """Indices of the layers that have codebooks."""
    tensors: Mapping[str, Tensor]
    """fp32 tensors: `k` and `v` `[1 or layers, 1 or heads, sub-vectors, centroids, width]`; if centred, `k_mean` and `v_mean`
    `[layers, heads, channels]`; with `rope="before"`, `frequencies` `[channels / 2]`."""
    model: str = ""
    """Name of the model."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Settings and errors of the calibration, as plain values."""
    fingerprint: Tensor | None = None
    """Fingerprint of the model weights, see `fingerprint_of`; None if not known."""
    _made: dict[Any, tuple[Quantizer, Quantizer]] = field(default_factory=dict, init=False)
    _rotations: dict[torch.device, Rotation] = field(default_factory=dict, init=False)
    _tensors: dict[torch.device, Mapping[str, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        sizes = self.sizes
        for name, value in (("layers", sizes.layers), ("kv_heads", sizes.kv_heads), ("head_dim", sizes.head_dim)):  # fmt: skip
            ok = is_int(value) and 1 <= value <= LARGEST
            check(name, value, ok, f"an int from 1 to {LARGEST}")
        ok = len(set(self.layers)) == len(self.layers) > 0
        ok = ok and all(is_int(x) and 0 <= x < sizes.layers for x in self.layers)
        check("layers", self.layers, ok, f"different layers below {sizes.layers}")
        self.form.check_head_dim(sizes.head_dim)
        found = {name: tuple(x.shape) for name, x in self.tensors.items()}
        if problem := mismatch(found, self.shapes()):
            raise ValueError(f"codebooks: {problem}")
        for name, x in self.tensors.items():
            if x.dtype != torch.float32 or not x.isfinite().all():
                raise ValueError(f"{name}: must hold finite fp32 values")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the required shape of each tensor by name."""
        form, sizes = self.form, self.sizes
        layers = 1 if form.scope == "model" else len(self.layers)
        heads = sizes.kv_heads if form.scope == "head" else 1
        width = sizes.head_dim // form.sub_vectors
        books = (layers, heads, form.sub_vectors, 2**form.bits, width)
        means = (len(self.layers), sizes.kv_heads, sizes.head_dim)
        found: dict[str, tuple[int, ...]] = {"k": books, "v": books}
        if form.centred:
            found |= {"k_mean": means, "v_mean": means}
        return found | ({"frequencies": (sizes.head_dim // 2,)} if form.rope == "before" else {})

    def check(self, model: ModelSizes) -> None:
        """Check that the codebooks were made for a model.

        Raises:
            ValueError: they were made for another model.
        """
        named = f" ({self.model})" if self.model else ""
        for name in ("layers", "kv_heads", "head_dim"):
            mine, other = getattr(self.sizes, name), getattr(model, name)
            if mine != other:
                raise ValueError(
                    f"made for a model{named} with {name}={mine}; must be {name}={other} for this model"
                )
        if self.sizes.config and model.config and self.sizes.config != model.config:
            raise ValueError(
                f"made for another model{named} of the same sizes; must be codebooks of this model"
            )

    def check_layer(self, layer: int) -> None:
        """Check that a layer has codebooks.

        Raises:
            ValueError: the layer has no codebooks.
        """
        if layer not in self.layers:
            raise ValueError(
                f"no codebooks for layer {layer}; must be one of {', '.join(map(str, self.layers))}"
            )

    def quantizers(self, layer: int, device: torch.device) -> tuple[Quantizer, Quantizer]:
        """Return the quantizers of keys and of values of a layer. All caches on a device share them."""
        if (layer, device) not in self._made:
            at = self.layers.index(layer)
            first = 0 if self.form.scope == "model" else at
            tensors = self._on(device)

            def one(name: str, planes: bool) -> Quantizer:
                mean = tensors[f"{name}_mean"][at] if self.form.centred else None
                return Quantizer(tensors[name][first], planes, mean)

            pair = one("k", self.form.pairing == "planes"), one("v", False)
            self._made[layer, device] = pair
        return self._made[layer, device]

    def rotation(self, device: torch.device) -> Rotation | None:
        """Return the rotation of keys, shared by all layers and caches on a device; None if keys are coded after RoPE."""
        if self.form.rope == "after":
            return None
        if device not in self._rotations:
            self._rotations[device] = Rotation(self._on(device)["frequencies"])
        return self._rotations[device]

    def _on(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return the tensors on a device, cached."""
        if device not in self._tensors:
            self._tensors[device] = {name: x.to(device) for name, x in self.tensors.items()}
        return self._tensors[device]


def write_codebooks(path: str | os.PathLike, books: Codebooks) -> None:
    """Write codebooks to a safetensors file atomically."""
    _as_file(books).save(Path(path))


def check_books(path: str, books: Codebooks, fingerprint: Tensor) -> None:
    """Check that codebooks were made for a model with this weight fingerprint, see `fingerprint_of`.

    Raises:
        ValueError: they were made for other weights.
    """
    _as_file(books).check_weights(f"codebooks={path!r}", fingerprint)


def read_codebooks(path: str | os.PathLike) -> Codebooks:
    """Read codebooks from a file. Repeated calls for an unchanged file return the same object.

    Raises:
        ValueError: the file is missing, damaged, inconsistent, or has another kind or version.
    """
    place = Path(path).expanduser()
    state = place.stat() if place.is_file() else None
    if state is None:
        raise ValueError(
            f"codebooks={str(path)!r}: no such file; must be a file written by dit-accel llm calibrate"
        )
    return _read(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read(path: str, changed: int, size: int) -> Codebooks:
    found = load_model_file(path, KIND, "codebooks")
    try:
        return Codebooks(
            form=CodebookForm(**found.settings["form"]),
            sizes=found.sizes,
            layers=tuple(found.settings["layers"]),
            tensors=found.tensors,
            model=found.model,
            notes=found.settings["notes"],
            fingerprint=found.fingerprint,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"codebooks={path!r}: {error}") from None


def _as_file(books: Codebooks) -> ModelFile:
    fingerprint = books.fingerprint
    if fingerprint is None:
        fingerprint = torch.zeros(books.sizes.layers, VALUES)
    settings = {
        "form": asdict(books.form),
        "layers": list(books.layers),
        "notes": dict(books.notes),
    }
    return ModelFile(KIND, books.tensors, books.sizes, fingerprint, books.model, settings)
