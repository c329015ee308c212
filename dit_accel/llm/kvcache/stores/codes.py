"""`Codes`: product-quantised keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.lut_attention import MAX_ROWS, lut_attention
from dit_accel.llm.kvcache.codebooks import check_books, read_codebooks
from dit_accel.llm.kvcache.coded import coded_attention, with_means
from dit_accel.llm.kvcache.part import POSITIONS, Part
from dit_accel.llm.kvcache.partial import Partial, merged_part
from dit_accel.llm.kvcache.quantizer import Quantizer
from dit_accel.llm.kvcache.rotation import Rotation
from dit_accel.llm.kvcache.store import ModelSizes, Store


@dataclass
class Codes(Store):
    """Store of product-quantised keys and values, as in MILLION (arXiv 2504.03661).

    Attention is computed on the codes, and no decoded token is kept. The codebooks determine whether keys are coded before
    or after RoPE. Keys coded before RoPE are rotated when they are read.
    """

    name: ClassVar[str] = "pq"
    settled: ClassVar[frozenset[str]] = frozenset({"layer"})
    codebooks: str | None = None
    """File written by `dit-accel llm calibrate`."""
    dtype: torch.dtype = field(default=torch.float32, init=False, repr=False)
    """Dtype of appended and of decoded tokens."""
    layer: int = field(default=0, init=False, repr=False)
    """Index of the layer."""

    def __post_init__(self) -> None:
        if self.codebooks is None:
            raise ValueError("codebooks=None: must be a file written by dit-accel llm calibrate")
        self.books = read_codebooks(self.codebooks)

    def prepare(self, layer: int, model: ModelSizes) -> None:
        try:
            self.books.check(model)
            self.books.check_layer(layer)
        except ValueError as error:
            raise ValueError(f"codebooks={self.codebooks!r}: {error}") from None
        self.layer = layer

    def check_weights(self, fingerprint: Tensor) -> None:
        assert self.codebooks is not None
        check_books(self.codebooks, self.books, fingerprint)

    @property
    def needs_positions(self) -> bool:
        return self.books.form.rope == "before"

    def encode(self, part: Part) -> Mapping[str, Tensor]:
        self.dtype = part.k.dtype
        k, v = self._on(part.k.device)
        rotation = self.books.rotation(part.k.device)
        if rotation is None:
            return {"k": k.encode(part.k), "v": v.encode(part.v)}
        positions = part.tensors[POSITIONS]
        keys = rotation.unturned(part.k, positions)
        return {"k": k.encode(keys), "v": v.encode(part.v), POSITIONS: positions}

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        k, v = self._on(tensors["k"].device)
        keys, rotation = k.decode(tensors["k"]), self.books.rotation(tensors["k"].device)
        if rotation is not None:
            keys = rotation.turned(keys, tensors[POSITIONS])
        return keys.to(self.dtype), v.decode(tensors["v"]).to(self.dtype)

    def attend_part(self, q: Tensor, part: Part, scale: float) -> Partial:
        """Return attention over the tokens of a part.

        The channels of the queries are reordered once, so that decoded keys need not be.
        """
        k, v = self._on(q.device)
        rotation = self.books.rotation(q.device)
        rows = k.grouped(q.float())
        if runs_here(q) and q.shape[2] * q.shape[3] <= MAX_ROWS:
            found = _looked_up(rows, part, k, v, rotation, scale)
        else:
            found = merged_part(
                coded_attention(
                    rows,
                    (x.k, x.v),
                    (k, v),
                    scale=scale,
                    visible=x.valid,
                    factors=None if rotation is None else rotation.factors(x.tensors[POSITIONS]),
                )
                for x in self.pieces(q, part)
            )
        return Partial(v.ungrouped(found.o).to(q.dtype), found.lse)

    def _on(self, device: torch.device) -> tuple[Quantizer, Quantizer]:
        """Return the quantizers of keys and values on a device."""
        return self.books.quantizers(self.layer, device)


def _looked_up(
    q: Tensor, part: Part, k: Quantizer, v: Quantizer, rotation: Rotation | None, scale: float
) -> Partial:
    """Return attention from the lookup-table kernel. Channels are in the order of the sub-vectors."""
    o, lse = lut_attention(
        q.flatten(2, 3),
        k.numbers(part.k),
        v.numbers(part.v),
        k.centroids if rotation is None else k.whole,
        v.centroids,
        scale=scale,
        visible=part.valid,
        positions=None if rotation is None else part.tensors[POSITIONS],
        frequencies=None if rotation is None else rotation.frequencies,
    )
    found = Partial(o.unflatten(2, q.shape[2:4]), lse.unflatten(2, q.shape[2:4]))
    return with_means(found, q, k if rotation is None else None, v, scale)
