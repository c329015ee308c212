"""Text tokens of joint sequences: splitting, padding, and reordering to [image, text]."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.models.tokens import take

Text = Literal["none", "first", "last"]
"""Position of the text in a sequence."""


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
    """Return [image, zeros, text] with `gap` zero tokens."""
    parts = [image, words]
    if gap:
        parts.insert(1, image.new_zeros(*image.shape[:2], gap, image.shape[3]))
    return torch.cat(parts, dim=2)


def valid_keys(
    length: int, text: Text, tokens: int, text_lengths: Int[Tensor, " b"]
) -> Bool[Tensor, "b l"]:
    """Return a mask of the keys of a joint sequence that are not padding at the end of the text.

    Args:
        length: number of keys, image and text.
        text: position of the text, "first" or "last".
        tokens: number of text tokens, with padding.
        text_lengths: number of text tokens of each row without padding.
    """
    place = torch.arange(length, device=text_lengths.device)
    if text == "first":
        return (place < text_lengths[:, None]) | (place >= tokens)
    return place < length - tokens + text_lengths[:, None]


def padding_to_text(
    x: Float[Tensor, "b h l d"], tokens: int, text_lengths: Int[Tensor, " b"]
) -> Float[Tensor, "b h l d"]:
    """Return [image, text, padding], given rows [text, image, padding] with text of different lengths.

    Args:
        x: rows [text, image, padding].
        tokens: number of text tokens, with padding.
        text_lengths: number of text tokens of each row without padding.
    """
    image, place = x.shape[2] - tokens, torch.arange(x.shape[2], device=x.device)
    lengths = text_lengths[:, None]
    # Padding has the same positions in both.
    words = torch.where(place < image + lengths, place - image, place)
    return _taken(x, torch.where(place < image, place + lengths, words))


def padding_to_end(
    x: Float[Tensor, "b h l d"], tokens: int, text_lengths: Int[Tensor, " b"]
) -> Float[Tensor, "b h l d"]:
    """Undo `padding_to_text`."""
    image, place = x.shape[2] - tokens, torch.arange(x.shape[2], device=x.device)
    lengths = text_lengths[:, None]
    rest = torch.where(place < image + lengths, place - lengths, place)
    return _taken(x, torch.where(place < lengths, place + image, rest))


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens `index` `[B, L]` of `x` `[B, H, L, D]`. The memory of all heads of a token is contiguous."""
    return take(x.transpose(1, 2), index).transpose(1, 2)
