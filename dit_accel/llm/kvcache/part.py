"""`Part`: tokens of a cache as tensors that are never changed in place, so that copies may share them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

TOKENS = 2
"""Axis of the tokens."""
POSITIONS = "positions"
"""Name of the tensor of positions `[B, 1 or H, rows]`."""


@dataclass(frozen=True)
class Part:
    """Tokens, encoded or not.

    A tensor may hold several slots in one row of its axis of tokens, such as scales that 32 tokens share.
    """

    tensors: Mapping[str, Tensor]
    """Tensors `[B, H, rows, ...]`."""
    slots: int
    """Places for tokens."""
    valid: Bool[Tensor, "b _h slots"] | None = None
    """Slots that hold a real token, for all heads or for each; None: all of them."""

    @staticmethod
    def of(
        k: Tensor,
        v: Tensor,
        valid: Bool[Tensor, "b _h slots"] | None = None,
        positions: Int[Tensor, "b _h slots"] | None = None,
    ) -> "Part":
        """Return exact keys and values `[B, H, L, D]` as a part; positions go with them for stores that need them."""
        tensors = {"k": k, "v": v}
        if positions is not None:
            tensors[POSITIONS] = positions
        return Part(tensors, k.shape[TOKENS], valid)

    @property
    def k(self) -> Tensor:
        """Exact keys `[B, H, L, D]`."""
        return self.tensors["k"]

    @property
    def v(self) -> Tensor:
        """Exact values `[B, H, L, D]`."""
        return self.tensors["v"]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors. A view counts as if it owned what it shows."""
        return sum(x.nbytes for x in self.tensors.values()) + (
            0 if self.valid is None else self.valid.nbytes
        )

    def cut(self, start: int, stop: int | None = None) -> "Part":
        """Return the slots from `start` to `stop`, which must lie at whole rows of every tensor."""
        stop = self.slots if stop is None else stop

        def rows(x: Tensor) -> Tensor:
            share = x.shape[TOKENS]
            first, last = (share * at // max(1, self.slots) for at in (start, stop))
            return x[:, :, first:last]

        tensors = {name: rows(x) for name, x in self.tensors.items()}
        valid = None if self.valid is None else self.valid[:, :, start:stop]
        return Part(tensors, stop - start, valid)

    def to(self, device: torch.device | None) -> "Part":
        """Return the part on a device; None: as it is."""
        if device is None:
            return self
        tensors = {name: x.to(device, non_blocking=True) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors)

    def own(self) -> "Part":
        """Return the part without memory that it does not show."""
        tensors = {
            name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
            for name, x in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def rows(self, index: Int[Tensor, " n"]) -> "Part":
        """Return the rows of the batch at `index`, in this order."""
        tensors = {name: x.index_select(0, index.to(x.device)) for name, x in self.tensors.items()}
        valid = self.valid
        return Part(tensors, self.slots, None if valid is None else valid[index.to(valid.device)])

    def take(self, index: Int[Tensor, "b _h n"]) -> "Part":
        """Return the slots at `index` of each row and head. Rows that several slots share are repeated for each."""

        def one(x: Tensor) -> Tensor:
            shared = max(1, self.slots // max(1, x.shape[TOKENS]))
            if x.shape[1] == 1:
                x = x.expand(-1, index.shape[1], *x.shape[2:])
            rows, heads, length = x.shape[:3]
            at = index.to(x.device).expand(rows, heads, -1) // shared
            # Whole rows of a flat tensor: several times as fast as `gather`, which looks up each number.
            first = torch.arange(rows * heads, device=x.device).view(rows, heads, 1) * length
            flat = x.flatten(0, 2).index_select(0, (first + at).flatten())
            return flat.view(rows, heads, -1, *x.shape[3:])

        valid = self.valid
        if valid is not None:
            heads = max(valid.shape[1], index.shape[1])
            valid = valid.expand(-1, heads, -1).gather(
                2, index.to(valid.device).expand(-1, heads, -1)
            )
        return Part({k: one(x) for k, x in self.tensors.items()}, index.shape[-1], valid)


def joined(first: Part | None, second: Part) -> Part:
    """Return two parts as one."""
    if first is None or not first.slots:
        return second
    if not second.slots:
        return first
    tensors = {
        name: torch.cat(_same_heads(x, second.tensors[name]), TOKENS)
        for name, x in first.tensors.items()
    }
    return Part(tensors, first.slots + second.slots, joined_masks([first, second]))


def _same_heads(first: Tensor, second: Tensor) -> list[Tensor]:
    """Return tensors for each head, if one of them is."""
    heads = max(first.shape[1], second.shape[1])
    return [x.expand(-1, heads, *x.shape[2:]) for x in (first, second)]


def joined_masks(parts: Sequence[Part]) -> Bool[Tensor, "b _h slots"] | None:
    """Return the valid slots of all parts, one after the other; None: all of them."""
    found = [x.valid for x in parts if x.valid is not None]
    if not found:
        return None
    shape = (len(found[0]), max(x.shape[1] for x in found))
    return torch.cat(
        [
            found[0].new_ones(*shape, x.slots) if x.valid is None else x.valid.expand(*shape, -1)
            for x in parts
        ],
        2,
    )


def hidden(parts: Sequence[Part], gone: Bool[Tensor, "b _h slots"]) -> list[Part]:
    """Return parts of which some slots are empty, and stay where they are."""
    masks = (~gone).split([x.slots for x in parts], 2)
    return [
        replace(x, valid=mask if x.valid is None else x.valid & mask)
        for x, mask in zip(parts, masks, strict=True)
    ]
