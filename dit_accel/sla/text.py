"""Text tokens of joint sequences: where they stand, and how they are put behind the image."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Text = Literal["none", "first", "last"]


def split_text(
    x: Float[Tensor, "b h l d"], text: Text, tokens: int
) -> tuple[Float[Tensor, "b h l_text d"], Float[Tensor, "b h l_image d"]]:
    """Return (text, image) of a joint sequence, as views."""
    if text == "first":
        return x[:, :, :tokens], x[:, :, tokens:]
    cut = x.shape[2] - tokens
    return x[:, :, cut:], x[:, :, :cut]


def image_first(
    image: Float[Tensor, "b h l_image d"], words: Float[Tensor, "b h l_text d"], gap: int
) -> Float[Tensor, "b h l d"]:
    """Return [image, zeros, text] with this many zeros."""
    parts = [image, words]
    if gap:
        parts.insert(1, image.new_zeros(*image.shape[:2], gap, image.shape[3]))
    return torch.cat(parts, dim=2)
