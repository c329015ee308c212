"""`BaseModel`: the transformer that an SLA checkpoint was made for, as the file describes it."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float32
from torch import Tensor

FINGERPRINT = "base.fingerprint"
FINGERPRINT_VALUES = 64
LEAST_SIMILARITY = 0.9
"""Least cosine between two fingerprints of one model. Other dtypes and merged LoRAs stay far above it; other
models are near 0."""
MOST_LAYERS, LARGEST = 4096, 1024
"""Largest number of layers, and of heads or head_dim, that a file may claim."""


class LayerGeometry(NamedTuple):
    """One self-attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseModel:
    """Geometry and fingerprint of a transformer, by which an SLA checkpoint recognises its base model."""

    transformer_class: str
    layers: tuple[LayerGeometry, ...]
    fingerprint: Float32[Tensor, "layers values"]
    """Some values of each layer's value projection; zeros where they cannot be read."""
    model: str = ""
    """Hub id or folder name; empty: unknown."""
    revision: str = ""
    """Commit of the hub repository; empty: unknown."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MOST_LAYERS:
            raise ValueError(f"{len(self.layers)} layers; accepted are 1 to {MOST_LAYERS}")
        if len({layer.name for layer in self.layers}) < len(self.layers):
            raise ValueError("two layers have the same name")
        for name, *sizes in self.layers:
            if not all(1 <= size <= LARGEST for size in sizes) or sizes[0] % sizes[1]:
                raise ValueError(
                    f"layer {name}: heads, kv_heads, head_dim {sizes}; accepted are 1 to {LARGEST}, heads a "
                    "multiple of kv_heads"
                )
        if not self.fingerprint.isfinite().all():
            raise ValueError(f"{FINGERPRINT}: not finite")

    def check(self, found: "BaseModel") -> None:
        """Refuse another transformer than this one; warn where the weights cannot be compared.

        Raises:
            ValueError: `found` has another class, other layers or other weights.
        """
        if found.transformer_class != self.transformer_class:
            raise ValueError(f"made for a {self.transformer_class}, not {found.transformer_class}")
        if len(found.layers) != len(self.layers):
            raise ValueError(
                f"made for {len(self.layers)} attention layers; this transformer has {len(found.layers)}"
            )
        for mine, other in zip(self.layers, found.layers, strict=True):
            if mine != other:
                raise ValueError(
                    f"made for {_described(mine)}; this transformer has {_described(other)}"
                )
        similarity = self.similarity(found)
        if similarity is None:
            warnings.warn(
                "the SLA checkpoint cannot be checked against this base model: the weights of the model, or of the one "
                "that the checkpoint was made for, cannot be read (quantised)",
                stacklevel=2,
            )
        elif similarity < LEAST_SIMILARITY:
            raise ValueError(
                f"made for another base model{f' ({self.model})' if self.model else ''}: similarity of the weights "
                f"{similarity:.2f}; accepted from {LEAST_SIMILARITY}"
            )

    def similarity(self, other: "BaseModel") -> float | None:
        """Return the cosine between the fingerprints over the layers that both have; None: no such layer."""
        a, b = self.fingerprint.double(), other.fingerprint.double()
        known = a.any(1) & b.any(1)
        if not known.any():
            return None
        a, b = a[known].flatten(), b[known].flatten()
        return float(a @ b / (a.norm() * b.norm()))


def _described(layer: LayerGeometry) -> str:
    return f"{layer.name} with {layer.heads} heads, {layer.kv_heads} kv_heads, head_dim {layer.head_dim}"
