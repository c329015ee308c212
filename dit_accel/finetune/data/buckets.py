"""Buckets: the sizes (frames, height, width) of training samples, and the choice of one for a file."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from torch import Tensor

from dit_accel.finetune.checks import bucket_sizes

_NAME = re.compile(r"(\d+)x(\d+)x(\d+)")
_SAME_SHAPE = 1.05
"""Aspect ratios within this factor of the nearest one count as equally near: 480 x 832 and 720 x 1280."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Size of samples that share a batch."""

    frames: int
    height: int
    """Pixels."""
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """Return the bucket of a name such as "33x64x64".

        Raises:
            ValueError: it is no such name.
        """
        found = _NAME.fullmatch(name)
        if not found:
            raise ValueError(
                f"bucket={name!r}: accepted is frames x height x width, such as '33x64x64'"
            )
        return cls(*map(int, found.groups()))


@dataclass(frozen=True)
class SizeRules:
    """Sizes that a model accepts."""

    multiple: int
    """Height and width are multiples of it."""
    frame_step: int
    """The number of frames is `frame_step` * k + 1; 0: 1, of an image model."""

    def check(self, bucket: Bucket, argument: str = "buckets") -> None:
        """Raise ValueError for a bucket that the model does not accept."""
        for name, value in (("height", bucket.height), ("width", bucket.width)):
            if value < self.multiple or value % self.multiple:
                low = max(value // self.multiple, 1) * self.multiple
                raise ValueError(
                    f"{argument}: {name} {value} of {bucket}; accepted are multiples of {self.multiple}, such as "
                    f"{low} or {low + self.multiple}"
                )
        if bucket.frames < 1 or bucket.frames != self.frames(bucket.frames):
            step = self.frame_step
            accepted = f"{step}k + 1, such as {self.frames(bucket.frames)}" if step else "1"
            raise ValueError(
                f"{argument}: {bucket.frames} frames of {bucket}; accepted is {accepted}"
            )

    def frames(self, available: int) -> int:
        """Return the largest accepted number of frames that is at most `available`."""
        return (
            (max(available, 1) - 1) // self.frame_step * self.frame_step + 1
            if self.frame_step
            else 1
        )

    def largest(self, frames: int, height: int, width: int) -> Bucket | None:
        """Return the largest bucket inside a clip of this size; None: the clip is too small."""
        height, width = (x // self.multiple * self.multiple for x in (height, width))
        return Bucket(self.frames(frames), height, width) if height and width else None


def parse_buckets(text: str, rules: SizeRules, argument: str = "buckets") -> tuple[Bucket, ...]:
    """Return the buckets of "frames,height,width;frames,height,width".

    Raises:
        ValueError: another form, a size that the model does not accept, or a bucket that comes twice.
    """
    buckets = tuple(Bucket(*size) for size in bucket_sizes(text, argument))
    for bucket in buckets:
        rules.check(bucket, argument)
    return buckets


def nearest_bucket(
    frames: int, height: int, width: int, buckets: Sequence[Bucket]
) -> Bucket | None:
    """Return the bucket that fits a clip best; None: the clip has fewer frames than each of them.

    Of the buckets that the clip has enough frames for (those of one frame only if there is no other): those of
    the nearest aspect ratio; of these the largest that needs no enlarging, or else the smallest; of these the
    one with the most frames.

    Args:
        frames, height, width: size of the clip.
        buckets: at least one.
    """
    from diffusers.training_utils import find_nearest_bucket

    long_enough = [x for x in buckets if x.frames <= frames]
    if not long_enough:
        return None
    # A clip is not made a still because a bucket of stills has its shape.
    long_enough = [x for x in long_enough if x.frames > 1] or long_enough
    # diffusers compares areas, which serves for buckets of one area: here all have the area 1.
    shapes = [(math.sqrt(x.height / x.width), math.sqrt(x.width / x.height)) for x in long_enough]
    nearest = long_enough[find_nearest_bucket(height, width, shapes)]
    ratio = nearest.height / nearest.width
    alike = [x for x in long_enough if 1 / _SAME_SHAPE <= x.height / x.width / ratio <= _SAME_SHAPE]
    inside = [x for x in alike if x.height <= height and x.width <= width]
    area = (
        max(x.height * x.width for x in inside)
        if inside
        else min(x.height * x.width for x in alike)
    )
    return max(x for x in alike if x.height * x.width == area)


def fit(
    picture: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Resize a picture to cover a size, with antialiasing, and cut out the centre.

    A picture of that size is returned as it is.
    """
    if picture.shape[:2] == (height, width):
        return picture
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = [
        max(round(picture.shape[0] * scale), height),
        max(round(picture.shape[1] * scale), width),
    ]
    resized = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
    if size != list(picture.shape[:2]):
        # On bytes torch computes what Pillow does.
        resized = F.interpolate(resized, size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = resized[0, :, top : top + height, left : left + width]
    return cut.permute(1, 2, 0).contiguous().numpy()


def to_pixels(clip: UInt8[np.ndarray, "f h w 3"]) -> Float32[Tensor, "3 f h w"]:
    """Return a clip as pixels in [-1, 1]."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float().div(127.5).sub(1.0)
