"""`BaseModel`: description of the transformer for which an SLA checkpoint was made."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float32
from torch import Tensor

FINGERPRINT = "base.fingerprint"
"""Name of the fingerprint in the file."""
FINGERPRINT_VALUES = 64
"""Number of values of the fingerprint per layer."""
LEAST_SIMILARITY = 0.9
"""Smallest cosine between two fingerprints of one model. Other dtypes and merged LoRAs of the model stay far above it.
Other models are near 0."""
MOST_LAYERS, LARGEST = 4096, 1024
"""Largest number of layers, and largest heads and head_dim, that a file may contain."""


class LayerGeometry(NamedTuple):
    """Geometry of one self-attention layer."""

    name: str
    """Name of the layer in the transformer."""
    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key and value heads."""
    head_dim: int
    """Channels per head."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseModel:
    """Geometry and fingerprint of a transformer. An SLA checkpoint uses them to recognise its base model."""

    transformer_class: str
    """Class name of the transformer in diffusers."""
    layers: tuple[LayerGeometry, ...]
    """Geometry of the self-attention layers."""
    fingerprint: Float32[Tensor, "layers values"]
    """Values of the value projection of each layer, or zeros if they cannot be read."""
    model: str = ""
    """Hub id or folder name; empty if unknown."""
    revision: str = ""
    """Commit of the hub repository; empty if unknown."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MOST_LAYERS:
            raise ValueError(f"layers: {len(self.layers)} layers; expected 1 to {MOST_LAYERS}")
        if len({layer.name for layer in self.layers}) < len(self.layers):
            raise ValueError("layers: two layers have the same name")
        for name, *sizes in self.layers:
            if not all(1 <= size <= LARGEST for size in sizes) or sizes[0] % sizes[1]:
                raise ValueError(
                    f"layer {name}: heads, kv_heads, head_dim = {sizes}; must be in [1, {LARGEST}], and heads must be a "
                    "multiple of kv_heads"
                )
        if not self.fingerprint.isfinite().all():
            raise ValueError(f"{FINGERPRINT}: must be finite")

    def check(self, found: "BaseModel") -> None:
        """Check that another transformer is this base model. Warn if the weights cannot be compared.

        Args:
            found: description of the transformer to check.

        Raises:
            ValueError: if `found` has another class, other layers or other weights.
        """
        if found.transformer_class != self.transformer_class:
            raise ValueError(
                f"made for {self.transformer_class}, not for {found.transformer_class}"
            )
        if len(found.layers) != len(self.layers):
            raise ValueError(
                f"made for {len(self.layers)} attention layers, but this transformer has {len(found.layers)}"
            )
        for mine, other in zip(self.layers, found.layers, strict=True):
            if mine != other:
                raise ValueError(
                    f"made for {_described(mine)}, but this transformer has {_described(other)}"
                )
        similarity = self.similarity(found)
        if similarity is None:
            warnings.warn(
                "the SLA checkpoint cannot be checked against this base model, because quantised weights cannot be compared",
                stacklevel=2,
            )
        elif similarity < LEAST_SIMILARITY:
            raise ValueError(
                f"made for another base model{f' ({self.model})' if self.model else ''}: the similarity of the weights is "
                f"{similarity:.2f}; must be at least {LEAST_SIMILARITY}"
            )

    def similarity(self, other: "BaseModel") -> float | None:
        """Return the cosine of the fingerprints over all layers that both have, or None without such layers."""
        a, b = self.fingerprint.double(), other.fingerprint.double()
        known = a.any(1) & b.any(1)
        if not known.any():
            return None
        a, b = a[known].flatten(), b[known].flatten()
        return float(a @ b / (a.norm() * b.norm()))


def _described(layer: LayerGeometry) -> str:
    return f"{layer.name} with {layer.heads} heads, {layer.kv_heads} kv_heads, head_dim {layer.head_dim}"
