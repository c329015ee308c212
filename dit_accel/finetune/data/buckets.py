"""Buckets: sizes (frames, height, width) of training samples, and the choice of a bucket for a file."""

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
"""Aspect ratios within this factor of each other count as equal, such as those of 480 x 832 and 720 x 1280."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Size of the samples of a batch."""

    frames: int
    """Number of frames; 1 for images."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """Return the bucket for a name such as "33x64x64".

        Raises:
            ValueError: if the name has another form.
        """
        found = _NAME.fullmatch(name)
        if not found:
            raise ValueError(
                f"bucket={name!r}: expected frames x height x width, such as '33x64x64'"
            )
        return cls(*map(int, found.groups()))


@dataclass(frozen=True)
class SizeRules:
    """Sizes that a model supports."""

    multiple: int
    """Height and width must be multiples of this number of pixels."""
    frame_step: int
    """The number of frames must be `frame_step * k + 1`. 0 means one frame (image models)."""

    def check(self, bucket: Bucket, argument: str = "buckets") -> None:
        """Raise ValueError if the model does not support a bucket. The message begins with `argument`."""
        for name, value in (("height", bucket.height), ("width", bucket.width)):
            if value < self.multiple or value % self.multiple:
                low = max(value // self.multiple, 1) * self.multiple
                raise ValueError(
                    f"{argument}: {name} {value} of {bucket} must be a multiple of {self.multiple}, such as {low} or "
                    f"{low + self.multiple}"
                )
        if bucket.frames < 1 or bucket.frames != self.frames(bucket.frames):
            step = self.frame_step
            expected = f"{step}k + 1, such as {self.frames(bucket.frames)}" if step else "1"
            raise ValueError(
                f"{argument}: number of frames {bucket.frames} of {bucket} must be {expected}"
            )

    def frames(self, available: int) -> int:
        """Return the largest supported number of frames that is at most `available`."""
        return (
            (max(available, 1) - 1) // self.frame_step * self.frame_step + 1
            if self.frame_step
            else 1
        )

    def largest(self, frames: int, height: int, width: int) -> Bucket | None:
        """Return the largest supported bucket inside a clip of this size, or None if the clip is too small."""
        height, width = (x // self.multiple * self.multiple for x in (height, width))
        return Bucket(self.frames(frames), height, width) if height and width else None


def parse_buckets(text: str, rules: SizeRules, argument: str = "buckets") -> tuple[Bucket, ...]:
    """Parse buckets of the form "frames,height,width;frames,height,width".

    Args:
        text: value of the option.
        rules: sizes that the model supports.
        argument: name of the option, for messages.

    Raises:
        ValueError: if the text has another form, or if a bucket is not supported or is given twice.
    """
    buckets = tuple(Bucket(*size) for size in bucket_sizes(text, argument))
    for bucket in buckets:
        rules.check(bucket, argument)
    return buckets


def nearest_bucket(
    frames: int, height: int, width: int, buckets: Sequence[Bucket]
) -> Bucket | None:
    """Return the bucket that fits a clip best, or None if every bucket has more frames than the clip.

    The choice has three steps:

    1. Keep the buckets for which the clip has enough frames. Buckets of one frame are kept only if there are no
       others.
    2. Keep the buckets with the nearest aspect ratio.
    3. Take the largest bucket that does not enlarge the clip, or else the smallest bucket. Among buckets of equal
       area, take the bucket with the most frames.

    Args:
        frames: number of frames of the clip.
        height: height of the clip in pixels.
        width: width of the clip in pixels.
        buckets: buckets to choose from, at least one.
    """
    from diffusers.training_utils import find_nearest_bucket

    long_enough = [x for x in buckets if x.frames <= frames]
    if not long_enough:
        return None
    # Do not reduce a clip to one frame just because an image bucket has the same shape.
    long_enough = [x for x in long_enough if x.frames > 1] or long_enough
    # `find_nearest_bucket` expects buckets of equal area, so scale all of them to area 1.
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
    """Resize a picture with antialiasing so that it covers a size, and crop the centre.

    A picture that already has the size is returned unchanged.
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
        # For uint8 input, torch gives the same result as Pillow.
        resized = F.interpolate(resized, size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = resized[0, :, top : top + height, left : left + width]
    return cut.permute(1, 2, 0).contiguous().numpy()


def to_pixels(clip: UInt8[np.ndarray, "f h w 3"]) -> Float32[Tensor, "3 f h w"]:
    """Convert a uint8 clip to float pixels in [-1, 1]."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float().div(127.5).sub(1.0)
