"""Packing of integers of 1 to 8 bits into bytes without unused bits."""

import math

import torch
from jaxtyping import UInt8
from torch import Tensor


def values_per_word(bits: int) -> int:
    """Return the smallest number of integers with `bits` bits that fill whole bytes."""
    return 8 // math.gcd(8, bits)


def pack(x: UInt8[Tensor, "*lead n"], bits: int) -> UInt8[Tensor, "*lead bytes"]:
    """Pack integers into `n * bits / 8` bytes.

    A byte holds integers from distant positions (for two per byte: positions i and i + n / 2), so that packing and
    unpacking work on contiguous slices.

    Args:
        x: integers below `2**bits`; `n` is a multiple of `values_per_word(bits)`.
        bits: number of bits per integer, 1 to 8.
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
    """Return the integers from bytes of `pack`."""
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
    """Return the fastest integer dtype with at least `size` bytes."""
    return torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64
