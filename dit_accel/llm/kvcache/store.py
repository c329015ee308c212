"""`Store`: how the tokens between the first and the last ones are stored."""

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
"""Slots that are added before they are put together with those that were there, at least."""
VALUES = 2**24
"""Decoded values that exist at a time."""
CPU_VALUES = 2**19
"""The same on a CPU, where they stay in its cache."""


@dataclass
class Store(ABC):
    """Tokens of one layer. The options of a store are its fields.

    The tokens lie in at most two parts. Forks share them; what one of them adds goes into a second part of its own.
    """

    name: ClassVar[str]
    settled: ClassVar[frozenset[str]] = frozenset({"tier", "device"})
    """Fields that are no options and that do not tell of the tokens."""
    parts: list[Part] = field(default_factory=list, init=False, repr=False)
    tier: Tier = field(default_factory=Tier, init=False, repr=False)
    """Memory in which the tokens lie."""
    device: torch.device | None = field(default=None, init=False, repr=False)
    """Device of the model, on which tokens are decoded."""

    @abstractmethod
    def encode(self, part: Part) -> Mapping[str, Tensor]:
        """Return exact keys and values as tensors with the axis of tokens at 2."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values `[B, H, n, D]` of encoded tokens."""

    @property
    def needs_positions(self) -> bool:
        """Whether exact tokens must come with their positions."""
        return False

    @property
    def granule(self) -> int:
        """Tokens come in multiples of this."""
        return 1

    def prepare(self, layer: int, model: "ModelSizes") -> None:  # noqa: B027 (most need nothing)
        """Get ready for a layer of a model.

        Raises:
            ValueError: the store is not made for this model.
        """

    def check_weights(self, fingerprint: Tensor) -> None:  # noqa: B027
        """Check that what was learned for the store is for this model; see `fingerprint_of`.

        Raises:
            ValueError: it is for another one.
        """

    @property
    def slots(self) -> int:
        """Places for tokens."""
        return sum(x.slots for x in self.parts)

    def visible(self) -> Bool[Tensor, "b _h slots"] | None:
        """Return the slots that hold a real token; None: all."""
        return joined_masks(self.parts)

    def append(self, part: Part) -> None:
        """Add exact tokens, a multiple of `granule`."""
        if not part.slots:
            return
        self.device = part.k.device
        # Contiguous, so that single tokens can be read without a copy of all.
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
        """Put tokens that were read from a file into their tier.

        Args:
            device: device of the model.
        """
        base, tail = self.parts[:1], self.parts[1:]
        self.parts = [*map(self.tier.place_base, base), *map(self.tier.place, tail)]
        self.device = device

    def attend(self, q: Float[Tensor, "b h g l_q d"], scale: float) -> Partial:
        """Return attention over all tokens."""
        return merged_part(self.attend_part(q, x.to(self.device), scale) for x in self.parts)

    def attend_part(self, q: Tensor, part: Part, scale: float) -> Partial:
        """Return attention over the tokens of a part: by default over decoded ones, some at a time."""
        found = []
        for some in self.pieces(q, part):
            k, v = self.decode(some.tensors)
            found.append(attention_part(q, k, v, scale=scale, visible=some.valid))
        return merged_part(found)

    def pieces(self, q: Float[Tensor, "b h g l_q d"], part: Part) -> Iterator[Part]:
        """Yield the tokens of a part, as many at a time as should be decoded at a time."""
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
        """Return attention over the slots at `index`, of each query position its own."""
        flat = index.flatten(2, 3)
        chosen = self.take(flat)
        k, v = self.decode(chosen.tensors)
        if chosen.valid is not None:
            real = chosen.valid.expand(*index.shape[:2], -1).unflatten(2, index.shape[2:])
            visible = real if visible is None else real & visible
        k, v = (x.unflatten(2, index.shape[2:]) for x in (k, v))
        return by_query(q, k, v, scale=scale, visible=visible)

    def take(self, index: Int[Tensor, "b h n"]) -> Part:
        """Return the encoded tokens of these slots, on the device of the model."""
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
        """Return the encoded tokens of these slots of a part."""
        return part.take(index)

    def heads_of(self, name: str) -> Int[Tensor, " h"] | None:
        """Return the heads that a tensor of this name holds; None: all of them."""
        return None

    def stored_heads(self) -> Bool[Tensor, " h"] | None:
        """Return the heads that have stored tokens; None: all of them."""
        return None

    def crop(self, count: int) -> Part | None:
        """Remove the last tokens, at most all.

        Returns:
            Decoded tokens that were to stay, but lay in one granule with tokens that had to go; None: there are none.
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
        """Return encoded tokens between two multiples of `granule`, on the device of the model."""
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
        """Keep these rows of the batch, in this order."""
        places = (self.tier.place_base, self.tier.place)
        self.parts = [place(x.rows(index)) for place, x in zip(places, self.parts, strict=False)]

    def fork(self) -> "Store":
        """Return a store with the same tokens, which both share until they change."""
        return copy(self)

    def clear(self) -> None:
        """Remove all tokens."""
        self.parts = []

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens."""
        return sum(x.nbytes for x in self.parts)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model that files made for it must fit."""

    layers: int
    kv_heads: int
    head_dim: int
    config: str = ""
    """Hash of what tells the model from others of these sizes; empty: unknown."""


def store_names() -> list[str]:
    """Return the names of all stores."""
    return list(classes_in(PACKAGE, Store))


def store_of(name: str, options: dict[str, Any] | None = None) -> Store:
    """Return an empty store by its name.

    Raises:
        ValueError: no such store or option, or a value that it does not accept.
    """
    kind = class_named("store", name, classes_in(PACKAGE, Store))
    return with_options(kind, name, options, "store_options")
