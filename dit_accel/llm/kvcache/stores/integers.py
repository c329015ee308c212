"""`Integers`: tokens as integers of two to eight bits."""

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
"""Dtype of scales and zero points. bf16 has 8 bits for a zero point, too few for channels whose mean is large; fp32 would
add two bits to each value at a group of 32."""


@dataclass
class Integers(Store):
    """Keys and values as integers with a scale and a zero point, after KIVI (arXiv 2402.02750).

    Keys share both per channel, over `group` tokens: some channels of keys are large in every token. Values share them
    per token, over `group` channels. A value takes `bits + 32 / group` bits in all.
    """

    name: ClassVar[str] = "int"
    bits: int = 4
    """Bits of each integer: 2, 3, 4 or 8."""
    group: int = 32
    """Tokens or channels that share a scale: 8, 16, 32, 64 or 128. Must divide the head dimension."""
    dtype: torch.dtype = field(default=torch.float32, init=False, repr=False)
    """Dtype of the tokens that came in, and of decoded ones."""

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
                f"group={self.group}: does not divide the head dimension {model.head_dim} of the model; accepted are "
                f"{', '.join(fitting) or 'head dimensions that are multiples of 8'}"
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
        """Return keys and values. A scale of keys belongs to `group` tokens, or to one if tokens were taken singly."""
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
    """Return values as integers, and the scale and the zero point that those along an axis share.

    Args:
        x: values.
        axis: axis of the values that share a scale.
        bits: bits of each integer.
        real: values that count. Others may get a large error. Default: all.
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
    # Integers are chosen for the stored scale and zero point, so that their rounding costs little.
    zero = low.clamp(-largest, largest).to(SCALE)
    scale = ((high - zero.float()) / levels).clamp(0, largest).to(SCALE)
    step = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return ((x - zero.float()) / step).round().clamp(0, levels).to(torch.uint8), scale, zero


def _values(x: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `_integers` stored."""
    return x.float().mul_(scale.float()).add_(zero.float()).to(dtype)
