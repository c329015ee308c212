"""Tokens by their places: some of them, in some order, alone or behind text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


@dataclass(frozen=True)
class TokenOrder:
    """A permutation of the tokens of a grid."""

    gather: Int[Tensor, " n"]
    """Raster token at each place."""
    scatter: Int[Tensor, " n"]
    """Place of each raster token."""

    def apply(self, x: Shaped[Tensor, "r n ..."]) -> Shaped[Tensor, "r n ..."]:
        """From raster order to this one."""
        return x.index_select(1, self.gather)

    def undo(self, x: Shaped[Tensor, "r n ..."]) -> Shaped[Tensor, "r n ..."]:
        """Back to raster order."""
        return x.index_select(1, self.scatter)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` `[R, n]` of `[R or 1, N, ...]`, `[R, n, ...]`."""
    rows = torch.arange(len(index), device=index.device)[:, None] if len(x) > 1 else 0
    return x[rows, index]


def joint_index(
    index: Int[Tensor, "r n"], tokens: int, length: int, offsets: list[int]
) -> Int[Tensor, "r m"]:
    """Places of [text, active image tokens, padding] in sequences of [text, image, padding].

    Args:
        index: active image tokens of each row.
        tokens: image tokens in all.
        length: of the full sequences.
        offsets: text tokens of each row.
    """
    every = torch.arange(length, device=index.device)
    return torch.stack(
        [
            torch.cat([every[:start], row + start, every[start + tokens :]])
            for row, start in zip(index, offsets, strict=True)
        ]
    )


_READ = WeakTensorKeyDictionary()


def read_once(x: Tensor, read: Callable[[Tensor], T]) -> T:
    """Return `read(x)`, which waits for the device of `x`: once for each tensor, and again after it was written to."""
    version = None if x.is_inference() else x._version
    known = _READ.setdefault(x, {})
    if read not in known or known[read][0] != version:
        known[read] = version, read(x)
    return known[read][1]
