"""Integers of 1 to 8 bits in bytes, without spare bits."""

import math

import torch
from jaxtyping import UInt8
from torch import Tensor


def values_per_word(bits: int) -> int:
    """Return the fewest integers of this many bits that fill whole bytes."""
    return 8 // math.gcd(8, bits)


def pack(x: UInt8[Tensor, "*lead n"], bits: int) -> UInt8[Tensor, "*lead bytes"]:
    """Return integers in `n * bits / 8` bytes.

    Args:
        x: integers below `2**bits`; `n` is a multiple of `values_per_word(bits)`.
        bits: bits of each of them, 1 to 8.
    """
    if bits == 8:
        return x
    count = values_per_word(bits)
    size = count * bits // 8
    kind = _word(size)
    at = (bits * torch.arange(count, device=x.device)).to(kind)
    words = (x.unflatten(-1, (-1, count)).to(kind) << at).sum(-1, dtype=kind)
    shift = (8 * torch.arange(size, device=x.device)).to(kind)
    return ((words[..., None] >> shift) & 255).to(torch.uint8).flatten(-2)


def unpack(x: UInt8[Tensor, "*lead bytes"], bits: int) -> UInt8[Tensor, "*lead n"]:
    """Return the integers that `pack` put into bytes."""
    if bits == 8:
        return x
    count = values_per_word(bits)
    size = count * bits // 8
    kind = _word(size)
    words = x if size == 1 else _words(x.unflatten(-1, (-1, size)).to(kind))
    shift = (bits * torch.arange(count, device=x.device)).to(kind)
    return ((words[..., None] >> shift) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def _words(x: Tensor) -> Tensor:
    """Return numbers whose bytes, the lowest first, lie along the last axis."""
    found = x[..., 0]
    for i in range(1, x.shape[-1]):
        found = found | x[..., i] << 8 * i
    return found


def _word(size: int) -> torch.dtype:
    """Return the cheapest dtype that holds so many bytes."""
    return torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64
