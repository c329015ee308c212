"""`Part`: tokens of a KV cache as tensors that are not changed in place, so that copies can share them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

TOKENS = 2
"""Token axis of the tensors."""
POSITIONS = "positions"
"""Name of the tensor with the positions of the tokens, `[B, 1 or H, rows]`."""


@dataclass(frozen=True)
class Part:
    """Tokens of a cache, exact or encoded by a store.

    One row of a tensor may belong to several slots, such as a scale that 32 tokens share.
    """

    tensors: Mapping[str, Tensor]
    """Tensors `[B, H, rows, ...]` by name."""
    slots: int
    """Number of token slots."""
    valid: Bool[Tensor, "b _h slots"] | None = None
    """True for slots with a real token (not padding), shared by the heads or per head; None if all are real."""

    @staticmethod
    def of(
        k: Tensor,
        v: Tensor,
        valid: Bool[Tensor, "b _h slots"] | None = None,
        positions: Int[Tensor, "b _h slots"] | None = None,
    ) -> "Part":
        """Return exact keys and values `[B, H, L, D]`, and positions for stores that need them, as a part."""
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
        """Bytes of the tensors. A view counts with its own size."""
        return sum(x.nbytes for x in self.tensors.values()) + (
            0 if self.valid is None else self.valid.nbytes
        )

    def cut(self, start: int, stop: int | None = None) -> "Part":
        """Return the slots from `start` to `stop`. Both must be at row boundaries of every tensor."""
        stop = self.slots if stop is None else stop

        def rows(x: Tensor) -> Tensor:
            share = x.shape[TOKENS]
            first, last = (share * at // max(1, self.slots) for at in (start, stop))
            return x[:, :, first:last]

        tensors = {name: rows(x) for name, x in self.tensors.items()}
        valid = None if self.valid is None else self.valid[:, :, start:stop]
        return Part(tensors, stop - start, valid)

    def to(self, device: torch.device | None) -> "Part":
        """Return the part on a device; None returns it unchanged."""
        if device is None:
            return self
        tensors = {name: x.to(device, non_blocking=True) for name, x in self.tensors.items()}
        return replace(self, tensors=tensors)

    def own(self) -> "Part":
        """Return the part with views of larger tensors copied, so that these can be freed."""
        tensors = {
            name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
            for name, x in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def rows(self, index: Int[Tensor, " n"]) -> "Part":
        """Return the batch rows `index`, in this order."""
        tensors = {name: x.index_select(0, index.to(x.device)) for name, x in self.tensors.items()}
        valid = self.valid
        return Part(tensors, self.slots, None if valid is None else valid[index.to(valid.device)])

    def take(self, index: Int[Tensor, "b _h n"]) -> "Part":
        """Return the slots `index` of each batch row and head. A tensor row that several slots share is repeated per slot."""

        def one(x: Tensor) -> Tensor:
            shared = max(1, self.slots // max(1, x.shape[TOKENS]))
            if x.shape[1] == 1:
                x = x.expand(-1, index.shape[1], *x.shape[2:])
            rows, heads, length = x.shape[:3]
            at = index.to(x.device).expand(rows, heads, -1) // shared
            # index_select copies whole rows and is several times faster than gather, which indexes each element.
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
    """Return the concatenation of two parts."""
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
    """Expand tensors with one shared head to the number of heads of the other tensor."""
    heads = max(first.shape[1], second.shape[1])
    return [x.expand(-1, heads, *x.shape[2:]) for x in (first, second)]


def joined_masks(parts: Sequence[Part]) -> Bool[Tensor, "b _h slots"] | None:
    """Return the concatenated `valid` masks of parts; None if all slots are valid."""
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
    """Return parts with the slots in `gone` marked as invalid. The slots keep their places."""
    masks = (~gone).split([x.slots for x in parts], 2)
    return [
        replace(x, valid=mask if x.valid is None else x.valid & mask)
        for x, mask in zip(parts, masks, strict=True)
    ]
