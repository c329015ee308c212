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

    Bytes are shared by integers that lie far apart (of 2 in a byte, the first of either half), so that vector
    instructions put them in and take them out.

    Args:
        x: integers below `2**bits`; `n` is a multiple of `values_per_word(bits)`.
        bits: bits of each of them, 1 to 8.
    """
    if bits == 8:
        return x
    count = values_per_word(bits)
    size = count * bits // 8
    values = x.unflatten(-1, (count, -1)).to(_word(size)).unbind(-2)
    words = values[0]
    for i, value in enumerate(values[1:], 1):
        words = words | value << bits * i
    return torch.cat([(words >> 8 * i & 255).to(torch.uint8) for i in range(size)], -1)


def unpack(x: UInt8[Tensor, "*lead bytes"], bits: int) -> UInt8[Tensor, "*lead n"]:
    """Return the integers that `pack` put into bytes."""
    if bits == 8:
        return x
    count = values_per_word(bits)
    size = count * bits // 8
    planes = x.unflatten(-1, (size, -1)).to(_word(size)).unbind(-2)
    words = planes[0]
    for i, plane in enumerate(planes[1:], 1):
        words = words | plane << 8 * i
    mask = 2**bits - 1
    return torch.cat([(words >> bits * i & mask).to(torch.uint8) for i in range(count)], -1)


def _word(size: int) -> torch.dtype:
    """Return the cheapest dtype that holds so many bytes."""
    return torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64
