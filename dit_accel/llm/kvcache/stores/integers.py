"""`Integers`: keys and values as integers of 2 to 8 bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dit_accel.config.base import check, is_int
from dit_accel.llm.kvcache.packing import pack, unpack
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.store import ModelSizes, Store

BITS = (2, 3, 4, 8)
GROUPS = (8, 16, 32, 64, 128)
SCALE = torch.float16
"""Dtype of scales and zero points. The 8-bit precision of bf16 is too low for zero points of channels with a large mean;
fp32 would cost two more bits per value at a group of 32."""


@dataclass
class Integers(Store):
    """Store of keys and values as integers with scales and zero points, as in KIVI (arXiv 2402.02750).

    In keys, `group` tokens share a scale and a zero point per channel, because some key channels are large in every token.
    In values, `group` channels of a token share them. A number takes `bits + 32 / group` bits in total.
    """

    name: ClassVar[str] = "int"
    bits: int = 4
    """Number of bits per integer: 2, 3, 4 or 8."""
    group: int = 32
    """Number of tokens or channels that share a scale: 8, 16, 32, 64 or 128. Must divide the head dimension."""
    dtype: torch.dtype = field(default=torch.float32, init=False, repr=False)
    """Dtype of appended and of decoded tokens."""

    def __post_init__(self) -> None:
        for name, choices in (("bits", BITS), ("group", GROUPS)):
            value = getattr(self, name)
            ok = is_int(value) and value in choices
            check(name, value, ok, " or ".join(map(str, choices)))

    @property
    def granule(self) -> int:
        return self.group

    def prepare(self, layer: int, model: ModelSizes) -> None:
        if model.head_dim % self.group:
            fitting = [str(x) for x in GROUPS if model.head_dim % x == 0]
            raise ValueError(
                f"group={self.group}: must divide head_dim={model.head_dim} of the model; possible are "
                f"{', '.join(fitting) or 'only models whose head_dim is a multiple of 8'}"
            )

    def encode(self, part: Part) -> Mapping[str, Tensor]:
        self.dtype = part.k.dtype
        tokens = (-1, self.group)
        real = None if part.valid is None else part.valid.unflatten(2, tokens)[..., None]
        k, k_scale, k_zero = _integers(part.k.unflatten(2, tokens), 3, self.bits, real)
        v, v_scale, v_zero = _integers(part.v.unflatten(3, tokens), 4, self.bits)
        return {
            "k": pack(k.flatten(2, 3), self.bits),
            "k_scale": k_scale.squeeze(3),
            "k_zero": k_zero.squeeze(3),
            "v": pack(v.flatten(3, 4), self.bits),
            "v_scale": v_scale.squeeze(4),
            "v_zero": v_zero.squeeze(4),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values. The scale of keys is per `group` tokens, or per token after `Part.take`."""
        k, v = (unpack(tensors[x], self.bits) for x in ("k", "v"))
        scale, zero = tensors["k_scale"], tensors["k_zero"]
        k = k.unflatten(2, (scale.shape[2], -1)) if k.shape[2] else k[:, :, :, None]
        k = _values(k, scale[:, :, :, None], zero[:, :, :, None], self.dtype)
        v = v.unflatten(3, (-1, self.group))
        v = _values(v, tensors["v_scale"][..., None], tensors["v_zero"][..., None], self.dtype)
        return k.flatten(2, 3), v.flatten(3, 4)


def _integers(
    x: Float[Tensor, "..."], axis: int, bits: int, real: Bool[Tensor, "..."] | None = None
) -> tuple[UInt8[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Quantise numbers to integers, with one scale and zero point per slice along an axis.

    Args:
        x: numbers to quantise.
        axis: axis along which numbers share a scale.
        bits: number of bits per integer.
        real: True for numbers that determine the scale. Other numbers may get a large error. Default: all.
    """
    x = x.float()
    low, high = x, x
    if real is not None:
        low, high = x.masked_fill(~real, torch.inf), x.masked_fill(~real, -torch.inf)
    low, high = low.amin(axis, keepdim=True), high.amax(axis, keepdim=True)
    if real is not None:
        some = real.any(axis, keepdim=True)
        low, high = (torch.where(some, y, torch.zeros_like(y)) for y in (low, high))
    levels, largest = 2**bits - 1, torch.finfo(SCALE).max
    # Quantise with the rounded scale and zero point, so that their rounding errors do not add up.
    zero = low.clamp(-largest, largest).to(SCALE)
    scale = ((high - zero.float()) / levels).clamp(0, largest).to(SCALE)
    step = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return ((x - zero.float()) / step).round().clamp(0, levels).to(torch.uint8), scale, zero


def _values(x: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers from the output of `_integers`."""
    return x.float().mul_(scale.float()).add_(zero.float()).to(dtype)
