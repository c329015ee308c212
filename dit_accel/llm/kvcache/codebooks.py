"""`Codebooks`: the file of `dit-accel llm calibrate`, which the store "pq" reads."""

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
"""Largest number of layers, heads and channels that a file may claim."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Form of codebooks: what is coded together, and by how many bits."""

    sub_vectors: int
    """Sub-vectors of a key or value."""
    bits: int
    """Bits of a code, 2 to 8."""
    scope: str = "layer"
    """Vectors that share codebooks: those of the whole model, of a layer, or of a head."""
    pairing: str = "neighbours"
    """Channels of keys that are coded together: neighbours, or planes (i and i + d / 2, which RoPE rotates together)."""
    centred: bool = False
    """Whether the mean of each head is subtracted first."""
    rope: str = "after"
    """Keys that are coded: those after RoPE, as in the paper, or those before it, with the pairing "planes". These are
    the same at every position; the positions are stored too, and keys that are read are rotated."""

    def __post_init__(self) -> None:
        ok = is_int(self.sub_vectors) and self.sub_vectors >= 1
        check("sub_vectors", self.sub_vectors, ok, "an int >= 1")
        check("bits", self.bits, is_int(self.bits) and 2 <= self.bits <= 8, "an int from 2 to 8")
        check_choice("scope", self.scope, SCOPES)
        check_choice("pairing", self.pairing, PAIRINGS)
        check_choice("rope", self.rope, ROPES)
        if self.rope == "before" and self.pairing != "planes":
            raise ValueError(f"pairing={self.pairing!r}: accepted with rope='before' is planes")
        check("centred", self.centred, isinstance(self.centred, bool), "true or false")

    def check_head_dim(self, head_dim: int) -> None:
        """Check that heads can be divided in this way, and codes fill whole bytes.

        Raises:
            ValueError: they cannot.
        """
        multiple = values_per_word(self.bits)
        if head_dim % self.sub_vectors or self.sub_vectors % multiple:
            raise ValueError(
                f"sub_vectors={self.sub_vectors}: accepted for heads of {head_dim} channels and codes of {self.bits} bits "
                f"are divisors of {head_dim} that are multiples of {multiple}"
            )
        if self.pairing == "planes" and (head_dim // self.sub_vectors) % 2:
            raise ValueError(
                f"sub_vectors={self.sub_vectors}: sub-vectors of {head_dim // self.sub_vectors} channels; planes accept an "
                "even number"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Codebooks:
    """Codebooks of keys and values of one model. The tensors are checked against the form and the sizes."""

    form: Form
    sizes: ModelSizes
    """Sizes of the model."""
    layers: tuple[int, ...]
    """Layers with codebooks."""
    tensors: Mapping[str, Tensor]
    """fp32: `k` and `v` `[1 or layers, 1 or heads, sub-vectors, centroids, width]`; if centred, `k_mean` and `v_mean`
    `[layers, heads, channels]`; for keys before RoPE `frequencies` `[channels / 2]`."""
    model: str = ""
    """Name of the model."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How they were made: plain values."""
    fingerprint: Tensor | None = None
    """See `fingerprint_of`; None: not known."""
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
                raise ValueError(f"{name}: accepted are finite fp32 values")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that the form requires, by name."""
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
        """Check that they were made for a model.

        Raises:
            ValueError: they were made for another one.
        """
        named = f" ({self.model})" if self.model else ""
        for name in ("layers", "kv_heads", "head_dim"):
            mine, other = getattr(self.sizes, name), getattr(model, name)
            if mine != other:
                raise ValueError(
                    f"made for a model{named} with {name}={mine}; accepted for this model is {other}"
                )
        if self.sizes.config and model.config and self.sizes.config != model.config:
            raise ValueError(
                f"made for another model{named} of the same sizes; accepted are codebooks of this one"
            )

    def check_layer(self, layer: int) -> None:
        """Check that they have codebooks of a layer.

        Raises:
            ValueError: they do not.
        """
        if layer not in self.layers:
            raise ValueError(
                f"no codebooks of layer {layer}; accepted are layers {', '.join(map(str, self.layers))}"
            )

    def quantizers(self, layer: int, device: torch.device) -> tuple[Quantizer, Quantizer]:
        """Return the codebooks of keys and of values of a layer. All caches on a device share them."""
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
        """Return the rotation of keys, one for all layers and caches on a device; None: keys are coded after RoPE."""
        if self.form.rope == "after":
            return None
        if device not in self._rotations:
            self._rotations[device] = Rotation(self._on(device)["frequencies"])
        return self._rotations[device]

    def _on(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return the tensors on a device."""
        if device not in self._tensors:
            self._tensors[device] = {name: x.to(device) for name, x in self.tensors.items()}
        return self._tensors[device]


def write_codebooks(path: str | os.PathLike, books: Codebooks) -> None:
    """Write the file atomically."""
    _as_file(books).save(Path(path))


def check_books(path: str, books: Codebooks, fingerprint: Tensor) -> None:
    """Check that codebooks are for a model with these weights; see `fingerprint_of`.

    Raises:
        ValueError: they are for another one.
    """
    _as_file(books).check_weights(f"codebooks={path!r}", fingerprint)


def read_codebooks(path: str | os.PathLike) -> Codebooks:
    """Read a file. Calls for a file that did not change share what was read.

    Raises:
        ValueError: it is missing, damaged, of another kind or version, or contradicts itself.
    """
    place = Path(path).expanduser()
    state = place.stat() if place.is_file() else None
    if state is None:
        raise ValueError(
            f"codebooks={str(path)!r}: no such file; accepted is a file of dit-accel llm calibrate"
        )
    return _read(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read(path: str, changed: int, size: int) -> Codebooks:
    found = load_model_file(path, KIND, "codebooks")
    try:
        return Codebooks(
            form=Form(**found.settings["form"]),
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
