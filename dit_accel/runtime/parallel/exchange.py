"""`Exchange`: conversion from a share of the tokens with all heads to all tokens with a share of the heads, and back."""

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.runtime.parallel.group import Group


class Exchange:
    """Implementation of the seam `exchange`, for the attention processors of one layout.

    Numbers that change between calls are stored as shapes of empty tensors, because torch.compile specialises on Python
    ints.

    Attributes:
        tokens: `[n, 0]`; n is the number of tokens of the layout that run, in all processes together.
        text: `[T, 0]`; T is the number of additional text tokens, in all processes together.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.tokens = torch.empty(0, 0)
        self.text = torch.empty(0, 0)

    @property
    def text_tokens(self) -> int:
        """Number of text tokens in all processes together."""
        return self.text.shape[0]

    def text_tokens_in(self, text: str) -> int:
        """Return the number of text tokens in a sequence, in all processes together. This process may have none of them.

        Args:
            text: position of the text in the sequence, as in `SparseProcessor.run`.
        """
        return 0 if text == "none" else self.text_tokens

    def to_heads(
        self,
        query: Float[Tensor, "b l h d"],
        key: Float[Tensor, "b l h_kv d"],
        value: Float[Tensor, "b l h_kv d"],
        text: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convert a share of the tokens with all heads to all tokens with a share of the heads, in one exchange.

        Args:
            query, key, value: projections of this process's tokens.
            text: position of the text in the sequence and in the result, as in `SparseProcessor.run`.
        """
        group = self.group
        q_shares, kv_shares = self._heads(query.shape[2], key.shape[2])
        widths = [a + 2 * b for a, b in zip(q_shares, kv_shares, strict=True)]
        x = [x.transpose(0, 1) for x in (query, key, value)]  # [l, b, h, d]
        local, rows, _, dim = query.transpose(0, 1).shape
        if _equal(widths):
            # One copy: [rank, l, b, heads, d].
            sent = torch.cat([y.unflatten(2, (group.size, -1)).movedim(2, 0) for y in x], dim=3)
        else:
            pieces = zip(
                *(y.split(n, 2) for y, n in zip(x, (q_shares, *[kv_shares] * 2), strict=True)),
                strict=True,
            )
            sent = torch.cat([torch.cat(piece, dim=2).flatten() for piece in pieces])
        own = widths[group.rank]
        segments = self._segments(text)
        lengths = [sum(n) for n in zip(*segments, strict=True)]
        received = group.exchange(
            sent.flatten(),
            [local * rows * n * dim for n in widths],
            [n * rows * own * dim for n in lengths],
        ).view(-1, rows, own, dim)
        if len(segments) > 1:
            ranks = [
                part.split(sizes)
                for part, sizes in zip(
                    received.split(lengths), zip(*segments, strict=True), strict=True
                )
            ]
            received = torch.cat(
                [piece for segment in zip(*ranks, strict=True) for piece in segment]
            )
        heads = [q_shares[group.rank], *[kv_shares[group.rank]] * 2]
        q, k, v = (y.transpose(0, 1) for y in received.split(heads, dim=2))
        return q, k, v

    def to_tokens(
        self,
        out: Float[Tensor, "b m own d"],
        heads: tuple[int, int],
        text: str,
    ) -> Float[Tensor, "b l h d"]:
        """Undo `to_heads` for the output of attention.

        Args:
            out: output of all tokens that run, for this process's heads.
            heads: numbers of query heads and of key heads in all processes.
            text: as in `to_heads`.
        """
        group = self.group
        shares, _ = self._heads(*heads)
        x = out.transpose(0, 1)  # [m, b, h, d]
        _, rows, own, dim = x.shape
        segments = self._segments(text)
        if len(segments) > 1:
            parts = [
                part.split(sizes)
                for part, sizes in zip(x.split([sum(n) for n in segments]), segments, strict=True)
            ]
            x = torch.cat([piece for of_rank in zip(*parts, strict=True) for piece in of_rank])
        lengths = [sum(n) for n in zip(*segments, strict=True)]
        local = lengths[group.rank]
        received = group.exchange(
            x.flatten(),
            [n * rows * own * dim for n in lengths],
            [local * rows * n * dim for n in shares],
        )
        if _equal(shares):
            result = received.view(group.size, local, rows, own, dim).movedim(0, 2).flatten(2, 3)
        else:
            pieces = received.split([local * rows * n * dim for n in shares])
            result = torch.cat(
                [y.view(local, rows, n, dim) for y, n in zip(pieces, shares, strict=True)], dim=2
            )
        return result.transpose(0, 1)

    def _heads(self, heads: int, kv_heads: int) -> tuple[list[int], list[int]]:
        """Return the shares of query heads and of key heads; the queries of a key head stay with it."""
        kv = self.group.shares(kv_heads)
        return [n * (heads // kv_heads) for n in kv], kv

    def _segments(self, text: str) -> list[list[int]]:
        """Return the shares of each rank in the parts of the sequence, text and image, in their order."""
        tokens = self.group.shares(self.tokens.shape[0])
        text_tokens = self.text_tokens_in(text)
        if not text_tokens:
            return [tokens]
        written = self.group.shares(text_tokens)
        return [written, tokens] if text == "first" else [tokens, written]


def _equal(sizes: list[int]) -> bool:
    return len({*sizes}) == 1
