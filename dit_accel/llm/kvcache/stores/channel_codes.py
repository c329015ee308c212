"""`ChannelCodes`: product-quantised keys and values, with unimportant key channels removed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Complex, Int
from torch import Tensor

from dit_accel.llm.kvcache.codebooks import Codebooks, check_books, read_codebooks
from dit_accel.llm.kvcache.coded import coded_attention
from dit_accel.llm.kvcache.part import POSITIONS, Part
from dit_accel.llm.kvcache.partial import Partial
from dit_accel.llm.kvcache.quantizer import Quantizer
from dit_accel.llm.kvcache.rotation import Rotation
from dit_accel.llm.kvcache.store import ModelSizes
from dit_accel.llm.kvcache.stores.channels import Channels


@dataclass
class ChannelCodes(Channels):
    """Store of product-quantised keys and values (MILLION, arXiv 2504.03661), with a mask of key channels (LeanK, arXiv
    2508.02215).

    A sub-vector of a key is stored if the mask keeps at least one of its channels.
    """

    name: ClassVar[str] = "channels_pq"
    settled: ClassVar[frozenset[str]] = Channels.settled | {"books", "layer"}
    codebooks: str | None = None
    """File written by `dit-accel llm calibrate`, with codes of 8 bits."""
    books: Codebooks | None = field(default=None, init=False, repr=False)
    layer: int = field(default=0, init=False, repr=False)
    dtype: torch.dtype = field(default=torch.float32, init=False, repr=False)
    """Dtype of decoded tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebooks is None:
            raise ValueError(
                "codebooks=None: must be a file written by dit-accel llm calibrate for the store 'channels_pq'"
            )
        self.books = read_codebooks(self.codebooks)
        form = self.books.form
        if form.bits != 8:
            raise ValueError(
                f"codebooks={self.codebooks!r}: has codes of {form.bits} bits; must have codes of 8 bits with a mask"
            )

    def prepare(self, layer: int, sizes: ModelSizes) -> None:
        super().prepare(layer, sizes)
        assert self.books is not None
        assert self.kept is not None
        try:
            self.books.check(sizes)
            self.books.check_layer(layer)
        except ValueError as error:
            raise ValueError(f"codebooks={self.codebooks!r}: {error}") from None
        self.layer = layer
        keys = self.books.quantizers(layer, torch.device("cpu"))[0]
        parts = self.books.form.sub_vectors
        self.kept = keys.grouped(self.kept.float()).unflatten(-1, (parts, -1)).amax(-1) > 0

    def check_weights(self, fingerprint: Tensor) -> None:
        super().check_weights(fingerprint)
        assert self.codebooks is not None
        assert self.books is not None
        check_books(self.codebooks, self.books, fingerprint)

    @property
    def needs_positions(self) -> bool:
        assert self.books is not None
        return self.books.form.rope == "before"

    def encode(self, part: Part) -> Mapping[str, Tensor]:
        self.dtype = part.k.dtype
        keys, values = self._books(part.k.device)
        # Empty tensor that carries the batch size and the device if no head keeps a channel.
        found = {"rows": part.k.new_empty(part.k.shape[0], 1, part.slots, 0)}
        k, rotation = part.k, self._rotation(part.k.device)
        if rotation is not None:
            found[POSITIONS] = part.tensors[POSITIONS]
            k = rotation.unturned(k, found[POSITIONS])
        k, v = keys.encode(k), values.encode(part.v)
        for width, heads, chosen in self.groups(part.k.device):
            at = chosen[None, :, None].expand(k.shape[0], -1, part.slots, -1)
            found[f"k{width}"], found[f"v{width}"] = k[:, heads].gather(3, at), v[:, heads]
        return found

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.kept is not None
        rows = tensors["rows"]
        keys, _ = self._books(rows.device)
        parts, _, width = keys.centroids.shape[1:]
        shape = (rows.shape[0], len(self.kept), rows.shape[2])
        k = keys.centroids.new_zeros(*shape, parts, width)
        v = keys.centroids.new_zeros(*shape, parts * width)
        for count, heads, chosen, some, values in self._quantizers(rows.device):
            made = some.decode(tensors[f"k{count}"]).unflatten(-1, (count, width))
            at = chosen[None, :, None, :, None].expand(made.shape)
            k[:, heads] = torch.zeros_like(k[:, heads]).scatter_(3, at, made)
            v[:, heads] = values.decode(tensors[f"v{count}"])
        k, rotation = keys.ungrouped(k.flatten(3)), self._rotation(rows.device)
        if rotation is not None:
            k = rotation.turned(k, tensors[POSITIONS])
        return k.to(self.dtype), v.to(self.dtype)

    def attend_part(self, q: Tensor, part: Part, scale: float) -> Partial:
        keys, _ = self._books(q.device)
        width, rotation = keys.centroids.shape[3], self._rotation(q.device)
        o, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf, dtype=torch.float32)
        rows = keys.grouped(q.float()).unflatten(-1, (-1, width))
        factors = None if rotation is None else rotation.factors(part.tensors[POSITIONS])
        for count, heads, chosen, some, values in self._quantizers(q.device):
            valid = part.valid
            if valid is not None and valid.shape[1] > 1:
                valid = valid[:, heads]
            mine = rows[:, heads]
            at = chosen[None, :, None, None, :, None].expand(*mine.shape[:4], -1, width)
            mine = mine.gather(4, at).flatten(4)
            codes = part.tensors[f"k{count}"], part.tensors[f"v{count}"]
            turns = None if factors is None else _planes(factors, heads, chosen, width // 2)
            found = coded_attention(
                mine, codes, (some, values), scale=scale, visible=valid, factors=turns
            )
            o[:, heads], lse[:, heads] = found.o.to(o.dtype), found.lse
        return Partial(o, lse)

    def take_part(self, part: Part, index: Int[Tensor, "b h n"]) -> Part:
        found = super().take_part(part, index)
        if not self.needs_positions:
            return found
        positions = Part({POSITIONS: part.tensors[POSITIONS]}, part.slots).take(index)
        return replace(found, tensors={**found.tensors, **positions.tensors})

    def heads_of(self, name: str) -> Int[Tensor, " h"] | None:
        return None if name == POSITIONS else super().heads_of(name)

    def _books(self, device: torch.device) -> tuple[Quantizer, Quantizer]:
        assert self.books is not None
        return self.books.quantizers(self.layer, device)

    def _rotation(self, device: torch.device) -> Rotation | None:
        assert self.books is not None
        return self.books.rotation(device)

    def _quantizers(
        self, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor, Quantizer, Quantizer]]:
        """Yield the groups of heads with quantizers of their kept sub-vectors."""
        keys, values = self._books(device)
        for count, heads, chosen in self.groups(device):
            per_head = keys.centroids[heads] if len(keys.centroids) > 1 else keys.centroids
            per_head = per_head.expand(len(heads), -1, -1, -1)
            at = chosen[:, :, None, None].expand(-1, -1, *per_head.shape[2:])
            k_mean = v_mean = None
            if keys.mean is not None and values.mean is not None:
                parts = keys.grouped(keys.mean[heads]).unflatten(-1, (-1, per_head.shape[3]))
                k_mean = parts.gather(1, at[:, :, 0]).flatten(1)
                v_mean = values.mean[heads]
            v = values.centroids[heads] if len(values.centroids) > 1 else values.centroids
            k = Quantizer(per_head.gather(1, at), mean=k_mean)
            yield count, heads, chosen, k, Quantizer(v, mean=v_mean)


def _planes(
    factors: Complex[Tensor, "b _h n half"],
    heads: Int[Tensor, " h"],
    chosen: Int[Tensor, "h parts"],
    planes: int,
) -> Complex[Tensor, "b h n kept"]:
    """Return the rotation factors of the selected sub-vectors, which have `planes` channel pairs each."""
    mine = factors[:, heads] if factors.shape[1] > 1 else factors.expand(-1, len(heads), -1, -1)
    at = (chosen[..., None] * planes + torch.arange(planes, device=chosen.device)).flatten(1)
    return mine.gather(3, at[None, :, None].expand(len(mine), -1, mine.shape[2], -1))
