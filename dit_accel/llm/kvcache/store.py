"""`Store`: memory format of the tokens between the first and the last tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.part import Part, joined, joined_masks
from dit_accel.llm.kvcache.partial import Partial, attention_part, by_query, merged_part
from dit_accel.llm.kvcache.tiers import Tier
from dit_accel.llm.plugins import class_named, classes_in, with_options

PACKAGE = "dit_accel.llm.kvcache.stores"
TAIL = 1024
"""Smallest number of new slots that are merged into the first part of a store."""
VALUES = 2**24
"""Largest number of decoded values in memory."""
CPU_VALUES = 2**19
"""Largest number of decoded values on a CPU, chosen to stay in its cache."""


@dataclass
class Store(ABC):
    """Base class of stores: tokens of one layer. The fields of a subclass are its options.

    The tokens are in at most two parts. Forks share the first part; new tokens go into a second part, not shared.
    """

    name: ClassVar[str]
    settled: ClassVar[frozenset[str]] = frozenset({"tier", "device"})
    """Non-option fields that are not saved with a cache."""
    parts: list[Part] = field(default_factory=list, init=False, repr=False)
    tier: Tier = field(default_factory=Tier, init=False, repr=False)
    """Memory tier that holds the tokens."""
    device: torch.device | None = field(default=None, init=False, repr=False)
    """Device of the model, where tokens are decoded."""

    @abstractmethod
    def encode(self, part: Part) -> Mapping[str, Tensor]:
        """Return the encoded form of exact tokens: tensors with the token axis at 2."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values `[B, H, n, D]` of encoded tokens."""

    @property
    def needs_positions(self) -> bool:
        """True if appended tokens must contain their positions."""
        return False

    @property
    def granule(self) -> int:
        """Tokens are appended in multiples of this number."""
        return 1

    def prepare(self, layer: int, model: "ModelSizes") -> None:  # noqa: B027 (most need nothing)
        """Prepare the store for a layer of a model.

        Raises:
            ValueError: the store does not fit the model.
        """

    def check_weights(self, fingerprint: Tensor) -> None:  # noqa: B027
        """Check that the files of the store were made for a model with this weight fingerprint, see `fingerprint_of`.

        Raises:
            ValueError: a file was made for other weights.
        """

    @property
    def slots(self) -> int:
        """Number of token slots."""
        return sum(x.slots for x in self.parts)

    def visible(self) -> Bool[Tensor, "b _h slots"] | None:
        """Return the mask of slots with a real token; None if all are real."""
        return joined_masks(self.parts)

    def append(self, part: Part) -> None:
        """Encode and append exact tokens; their number is a multiple of `granule`."""
        if not part.slots:
            return
        self.device = part.k.device
        # Contiguous tensors allow reading single tokens without copying all of them.
        tensors = {name: x.contiguous() for name, x in self.encode(part).items()}
        new = self.tier.place(Part(tensors, part.slots, part.valid))
        if not self.parts:
            self.parts = [self.tier.place_base(new)]
            return
        base, *tail = self.parts
        new = joined(tail[0], new) if tail else new
        if tail and new.slots > max(TAIL, base.slots // 2):
            self.parts = [self.tier.place_base(joined(base, new))]
        else:
            self.parts = [base, self.tier.place(new)]

    def placed(self, device: torch.device) -> None:
        """Move tokens that were read from a file to their memory tier.

        Args:
            device: device of the model.
        """
        base, tail = self.parts[:1], self.parts[1:]
        self.parts = [*map(self.tier.place_base, base), *map(self.tier.place, tail)]
        self.device = device

    def attend(self, q: Float[Tensor, "b h g l_q d"], scale: float) -> Partial:
        """Return attention over all stored tokens."""
        return merged_part(self.attend_part(q, x.to(self.device), scale) for x in self.parts)

    def attend_part(self, q: Tensor, part: Part, scale: float) -> Partial:
        """Return attention over the tokens of a part. The default decodes them in chunks."""
        found = []
        for some in self.pieces(q, part):
            k, v = self.decode(some.tensors)
            found.append(attention_part(q, k, v, scale=scale, visible=some.valid))
        return merged_part(found)

    def pieces(self, q: Float[Tensor, "b h g l_q d"], part: Part) -> Iterator[Part]:
        """Yield the tokens of a part in chunks of a size suitable for decoding."""
        values = CPU_VALUES if q.device.type == "cpu" else VALUES
        step = values // (q.shape[0] * q.shape[1] * q.shape[4])
        step = max(1, step // self.granule) * self.granule
        for start in range(0, part.slots, step):
            yield part.cut(start, min(start + step, part.slots))

    def attend_at(
        self,
        q: Float[Tensor, "b h g l_q d"],
        index: Int[Tensor, "b h l_q n"],
        visible: Bool[Tensor, "b h l_q n"] | None,
        scale: float,
    ) -> Partial:
        """Return attention over the slots in `index`, which differ between query positions."""
        flat = index.flatten(2, 3)
        chosen = self.take(flat)
        k, v = self.decode(chosen.tensors)
        if chosen.valid is not None:
            real = chosen.valid.expand(*index.shape[:2], -1).unflatten(2, index.shape[2:])
            visible = real if visible is None else real & visible
        k, v = (x.unflatten(2, index.shape[2:]) for x in (k, v))
        return by_query(q, k, v, scale=scale, visible=visible)

    def take(self, index: Int[Tensor, "b h n"]) -> Part:
        """Return the encoded tokens of the slots `index`, on the device of the model."""
        return self._take(index).to(self.device)

    def _take(self, index: Int[Tensor, "b h n"]) -> Part:
        first = self.parts[0]
        if len(self.parts) == 1:
            return self.take_part(first, index)
        inside = index < first.slots
        near = self.take_part(first, index.clamp(max=first.slots - 1))
        far = self.take_part(self.parts[1], (index - first.slots).clamp(min=0))
        valid = None
        if near.valid is not None or far.valid is not None:
            every = torch.ones_like(inside)
            valid = torch.where(
                inside,
                every if near.valid is None else near.valid,
                every if far.valid is None else far.valid,
            )

        tensors = {}
        for name, x in near.tensors.items():
            heads = self.heads_of(name)
            mask = (inside if heads is None else inside[:, heads]).to(x.device)
            mask = mask.reshape(*mask.shape, *[1] * (x.ndim - 3))
            tensors[name] = torch.where(mask, x, far.tensors[name])
        return Part(tensors, index.shape[-1], valid)

    def take_part(self, part: Part, index: Int[Tensor, "b h n"]) -> Part:
        """Return the encoded tokens of the slots `index` of a part."""
        return part.take(index)

    def heads_of(self, name: str) -> Int[Tensor, " h"] | None:
        """Return the heads that the tensor `name` contains; None for all heads."""
        return None

    def stored_heads(self) -> Bool[Tensor, " h"] | None:
        """Return the mask of heads that have stored tokens; None for all heads."""
        return None

    def crop(self, count: int) -> Part | None:
        """Remove the last `count` tokens.

        Returns:
            Decoded tokens that must stay but share a granule with removed tokens; None if there are none.
        """
        kept = max(0, self.slots - count)
        whole = kept // self.granule * self.granule
        rest = None
        if kept > whole:
            chosen = self.cut(whole, whole + self.granule)
            rest = Part.of(*self.decode(chosen.tensors), chosen.valid).cut(0, kept - whole)
        base = self.parts[0].slots if self.parts else 0
        parts = [
            x.cut(0, n)
            for x, n in zip(self.parts, (min(whole, base), max(0, whole - base)), strict=False)
        ]
        self.parts = [x for x in parts if x.slots]
        return rest

    def cut(self, start: int, stop: int) -> Part:
        """Return the encoded tokens from `start` to `stop`, multiples of `granule`, on the device of the model."""
        found, first = None, 0
        for part in self.parts:
            last = first + part.slots
            some = part.cut(
                min(max(0, start - first), part.slots), min(max(0, stop - first), part.slots)
            )
            found, first = joined(found, some), last
        assert found is not None
        return found.to(self.device)

    def rows(self, index: Int[Tensor, " n"]) -> None:
        """Select the batch rows `index`, in this order."""
        places = (self.tier.place_base, self.tier.place)
        self.parts = [place(x.rows(index)) for place, x in zip(places, self.parts, strict=False)]

    def fork(self) -> "Store":
        """Return a copy that shares memory until one of the two changes."""
        return copy(self)

    def clear(self) -> None:
        """Remove all tokens."""
        self.parts = []

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tokens."""
        return sum(x.nbytes for x in self.parts)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, which files made for it are checked against."""

    layers: int
    kv_heads: int
    head_dim: int
    config: str = ""
    """Hash of further config fields, see `config_hash`; empty if not known."""


def store_of(name: str, options: dict[str, Any] | None = None) -> Store:
    """Return a new empty store.

    Args:
        name: name of the store.
        options: field values. Default: the defaults of the store.

    Raises:
        ValueError: a name or an option does not exist, or a value is invalid.
    """
    kind = class_named("store", name, classes_in(PACKAGE, Store))
    return with_options(kind, name, options, "store_options")
