"""`Base`: how an adapter knows the transformer that it was made for. Model-free."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float32
from torch import Tensor

FINGERPRINT = "base.fingerprint"
FINGERPRINT_VALUES = 64
LEAST_SIMILARITY = 0.9
"""Between fingerprints of one model: other dtypes and merged LoRAs stay far above, other models near 0."""
MOST_LAYERS, LARGEST = 4096, 1024
"""Bounds on what a header may claim before anything is made from it."""


class LayerGeometry(NamedTuple):
    """One self-attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    """A transformer, as far as adapters tell transformers apart."""

    transformer_class: str
    layers: tuple[LayerGeometry, ...]
    fingerprint: Float32[Tensor, "layers values"]
    """Some values of each layer's value projection, or zeros where they cannot be read."""
    model: str = ""
    """Hub id or folder name."""
    revision: str = ""
    """Commit of the hub repository."""

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

    def check(self, found: "Base") -> None:
        """Refuse a transformer other than this one; warn where no weights can be compared.

        Raises:
            ValueError: it has another class, other layers or other weights.
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
                "sparse attention's weights: whether they belong to this base model cannot be checked, because its "
                "weights, or those that the adapter was made for, cannot be read (quantised)",
                stacklevel=2,
            )
        elif similarity < LEAST_SIMILARITY:
            raise ValueError(
                f"made for another base model{f' ({self.model})' if self.model else ''}: similarity of the weights "
                f"{similarity:.2f}; accepted from {LEAST_SIMILARITY}"
            )

    def similarity(self, other: "Base") -> float | None:
        """Cosine between the fingerprints, over the layers that both know; None: there is none."""
        a, b = self.fingerprint.double(), other.fingerprint.double()
        known = a.any(1) & b.any(1)
        if not known.any():
            return None
        a, b = a[known].flatten(), b[known].flatten()
        return float(a @ b / (a.norm() * b.norm()))


def _described(layer: LayerGeometry) -> str:
    return f"{layer.name} with {layer.heads} heads, {layer.kv_heads} kv_heads, head_dim {layer.head_dim}"
