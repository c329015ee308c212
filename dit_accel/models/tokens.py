"""Token indices: permutations, subsets, and positions in sequences with text."""

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
    """Raster index of the token at each position."""
    scatter: Int[Tensor, " n"]
    """Position of each raster token; the inverse of `gather`."""

    def apply(self, x: Shaped[Tensor, "r n ..."]) -> Shaped[Tensor, "r n ..."]:
        """Permute tokens from raster order to this order."""
        return x.index_select(1, self.gather)

    def undo(self, x: Shaped[Tensor, "r n ..."]) -> Shaped[Tensor, "r n ..."]:
        """Permute tokens from this order to raster order."""
        return x.index_select(1, self.scatter)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens `index` `[R, n]` of `x` `[R or 1, N, ...]`, as `[R, n, ...]`."""
    rows = torch.arange(len(index), device=index.device)[:, None] if len(x) > 1 else 0
    return x[rows, index]


def joint_index(
    index: Int[Tensor, "r n"], tokens: int, length: int, offsets: list[int]
) -> Int[Tensor, "r m"]:
    """Return the positions of [text, active image tokens, padding] in sequences [text, image, padding].

    Args:
        index: active image tokens of each row.
        tokens: number of image tokens in all.
        length: length of the full sequences.
        offsets: number of text tokens of each row.
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
    """Return `read(x)`, which waits for the device of `x`.

    The result is cached for each tensor, until the tensor is written to.
    """
    version = None if x.is_inference() else x._version
    known = _READ.setdefault(x, {})
    if read not in known or known[read][0] != version:
        known[read] = version, read(x)
    return known[read][1]
