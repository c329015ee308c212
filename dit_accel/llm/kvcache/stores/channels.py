"""`Channels`: keys with unimportant channels removed (LeanK, arXiv 2508.02215)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dit_accel.llm.kvcache.model_file import ModelFile, read_model_file
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import Partial, attention_part
from dit_accel.llm.kvcache.store import ModelSizes, Store

KIND = "channel mask"


@dataclass
class Channels(Store):
    """Store of the key channels that a mask keeps, and of complete values.

    Heads that keep the same number of channels share a tensor. A head that keeps no channel has no stored tokens and reads
    only the exact first and last tokens.
    """

    name: ClassVar[str] = "channels"
    settled: ClassVar[frozenset[str]] = frozenset({"kept", "file"})
    mask: str | None = None
    """File written by `dit-accel llm learn-mask`."""
    kept: Bool[Tensor, "h d"] | None = field(default=None, init=False, repr=False)
    """Mask of the kept channels of this layer."""
    file: ModelFile | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mask is None:
            raise ValueError("mask=None: must be a file written by dit-accel llm learn-mask")

    def prepare(self, layer: int, sizes: ModelSizes) -> None:
        assert self.mask is not None
        self.file = read_model_file(self.mask, KIND, sizes, "mask")
        self.kept = self.file.tensors["mask"][layer]

    def check_weights(self, fingerprint: Tensor) -> None:
        assert self.file is not None
        self.file.check_weights(f"mask={self.mask!r}", fingerprint)

    def groups(self, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each number of kept channels, the heads with this number, and their channels `[heads, width]`."""
        assert self.kept is not None
        widths = self.kept.sum(1)
        for width in sorted(set(widths.tolist()) - {0}):
            heads = (widths == width).nonzero()[:, 0]
            channels = self.kept[heads].nonzero()[:, 1].reshape(len(heads), width)
            yield width, heads.to(device), channels.to(device)

    def encode(self, part: Part) -> Mapping[str, Tensor]:
        found = {}
        for width, heads, channels in self.groups(part.k.device):
            found[f"k{width}"] = _chosen(part.k[:, heads], channels)
            found[f"v{width}"] = part.v[:, heads]
        # Keeps the number of rows and the device of a layer whose heads keep nothing.
        found["rows"] = part.k.new_empty(part.k.shape[0], 1, part.slots, 0)
        return found

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.kept is not None
        heads, head_dim = self.kept.shape
        rows = tensors["rows"]
        k = rows.new_zeros(rows.shape[0], heads, rows.shape[2], head_dim)
        v = torch.zeros_like(k)
        for width, some, channels in self.groups(rows.device):
            at = channels[None, :, None].expand(*tensors[f"k{width}"].shape)
            part = torch.zeros_like(k[:, some]).scatter_(3, at, tensors[f"k{width}"])
            k[:, some], v[:, some] = part, tensors[f"v{width}"]
        return k, v

    def attend_part(self, q: Tensor, part: Part, scale: float) -> Partial:
        o, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf, dtype=torch.float32)
        for width, heads, channels in self.groups(q.device):
            valid = part.valid
            if valid is not None and valid.shape[1] > 1:
                valid = valid[:, heads]
            at = channels[None, :, None, None].expand(*q[:, heads].shape[:-1], -1)
            found = attention_part(
                q[:, heads].gather(4, at),
                part.tensors[f"k{width}"],
                part.tensors[f"v{width}"],
                scale=scale,
                visible=valid,
            )
            o[:, heads], lse[:, heads] = found.o, found.lse
        return Partial(o, lse)

    def take_part(self, part: Part, index: Int[Tensor, "b h n"]) -> Part:
        found = {"rows": part.tensors["rows"].new_empty(*index.shape[::2], 0)[:, None]}
        for width, heads, _ in self.groups(index.device):
            at = index[:, heads, :, None]
            for name in (f"k{width}", f"v{width}"):
                x = part.tensors[name]
                found[name] = x.gather(2, at.expand(-1, -1, -1, x.shape[3]))
        stored = self.stored_heads().to(index.device)[None, :, None].expand_as(index)
        valid = Part({}, part.slots, part.valid).take(index).valid
        return Part(found, index.shape[2], stored if valid is None else stored & valid)

    def stored_heads(self) -> Bool[Tensor, " h"]:
        assert self.kept is not None
        return self.kept.any(1)

    def heads_of(self, name: str) -> Int[Tensor, " h"] | None:
        assert self.kept is not None
        if name == "rows":
            return torch.zeros(1, dtype=torch.long)
        return (self.kept.sum(1) == int(name[1:])).nonzero()[:, 0]


def _chosen(k: Tensor, channels: Int[Tensor, "h w"]) -> Tensor:
    """Return the selected channels of keys `[B, h, L, D]`."""
    return k.gather(3, channels[None, :, None].expand(k.shape[0], -1, k.shape[2], -1))
