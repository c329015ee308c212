"""Procedural clips and stills: one anti-aliased shape on a plain background, drawn in batches.

Lengths are fractions of the shorter side, and a clip of any number of frames shows the whole motion,
so one description can be drawn at any size. A still is one frame of a clip. Clips hold out a tenth of
the (shape, colour, motion) combinations. Stills hold out a tenth of the (shape, colour, background)
combinations by the same rule: there are as many backgrounds as motions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .vocabulary import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    MOTIONS,
    TEMPLATES,
    Combination,
    caption,
    combinations,
)

RADIUS = 0.14  # of the smallest object; the largest has twice that
HALF_PATH = 0.10  # half the distance of the slowest straight motion; the fastest has twice that
ORBIT = 0.17  # radius of circling motions
SLOWEST_TURNS = 0.6  # turns of the slowest circling motion; the fastest makes twice as many
MARGIN = 0.02  # always left free at the edge of the frame
FP32 = torch.float32  # given explicitly, because users may change torch's default dtype

_DIRECTIONS = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))  # straight; y points down
_TURN_SIGNS = (0.0, 0.0, 0.0, 0.0, 1.0, -1.0)  # clockwise angles grow, because y points down
_NAMING = torch.tensor([i for i, text in enumerate(TEMPLATES) if "{background}" in text])


class Placement(NamedTuple):
    """Freedom in placing the path of an object, and whether clips or stills are described."""

    spread: float
    """Share of the free room over which the centre of the path varies."""
    phase: float
    """Turns over which the starting angle of circling objects varies, from the rightmost point."""
    still: bool = False
    """Describe stills: middles of straight motions, and points of circles too unless `phase` is 0."""


# Nearly central paths keep the samples simple enough for a model that trains in under an hour.
CENTRAL, STILL = Placement(0.2, 0.125), Placement(0.4, 0.0, still=True)
# For training autoencoders, which must work in the whole frame.
ANYWHERE, STILL_ANYWHERE = Placement(0.75, 1.0), Placement(1.0, 1.0, still=True)


@dataclass(frozen=True)
class Clips:
    """Descriptions of a batch of clips, one entry per clip."""

    shape: Int[Tensor, " n"]
    colour: Int[Tensor, " n"]
    motion: Int[Tensor, " n"]
    background: Int[Tensor, " n"]
    template: Int[Tensor, " n"]
    size: Float[Tensor, " n"]
    """In [1, 2]: the radius of the object is `RADIUS * size` of the shorter side."""
    speed: Float[Tensor, " n"]
    """In [1, 2]; 1 is the slowest."""
    place: Float[Tensor, "n 2"]
    """In [-1, 1]: position (x, y) of the centre of the path in the free room."""
    phase: Float[Tensor, " n"]
    """In [0, 1): starting angle of circling objects, in turns."""

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice) -> "Clips":
        return Clips(*(getattr(self, field.name)[rows] for field in fields(self)))

    def captions(self, with_motion: bool = True) -> list[str]:
        """Return one caption per clip, or per still with `with_motion=False`."""
        labels = (self.shape, self.colour, self.motion, self.background, self.template)
        return [
            caption(Combination(s, c, m), b, t, with_motion)
            for s, c, m, b, t in torch.stack(labels, 1).tolist()
        ]


def draw_clips(
    count: int, generator: torch.Generator, split: str = "train", placement: Placement = CENTRAL
) -> Clips:
    """Return descriptions of `count` random clips or stills of a split, uniform, from a CPU generator."""
    allowed = combinations(split)
    chosen = torch.randint(len(allowed), (count,), generator=generator).tolist()
    return describe_clips([allowed[i] for i in chosen], generator, placement)


def describe_clips(
    chosen: Sequence[tuple[int, int, int]],
    generator: torch.Generator,
    placement: Placement = CENTRAL,
    naming: bool = False,
) -> Clips:
    """Return descriptions of clips or stills of given combinations; `generator` decides everything else.

    Args:
        chosen: indices into SHAPES, COLOURS and MOTIONS; for stills SHAPES, COLOURS and BACKGROUNDS.
        generator: CPU generator.
        placement: placement of the objects.
        naming: make all captions name the background.
    """
    count = len(chosen)
    shape, colour, last = torch.tensor(chosen, dtype=torch.long).reshape(count, 3).unbind(1)
    motion = last
    if placement.still:
        kinds = len(MOTIONS) if placement.phase else len(_DIRECTIONS)
        motion = torch.randint(kinds, (count,), generator=generator)
    background = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    template = torch.randint(len(TEMPLATES), (count,), generator=generator)
    size, speed, x, y, phase = torch.rand(5, count, generator=generator, dtype=FP32)
    place = placement.spread * (torch.stack([x, y], 1) * 2 - 1)
    background = last if placement.still else background
    template = _NAMING[template % len(_NAMING)] if naming else template
    labels = (shape, colour, motion, background, template)
    return Clips(*labels, 1 + size, 1 + speed, place, placement.phase * phase)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=FP32)


def centres(clips: Clips, num_frames: int, height: int, width: int) -> Float[Tensor, "n t 2"]:
    """Return the centre (x, y) of the object in each frame, in pixels. Pixel i has its centre at i + 0.5."""
    scale, frame = min(height, width), _tensor([width, height])
    time = _tensor([0.0]) if num_frames == 1 else torch.linspace(-1, 1, num_frames, dtype=FP32)
    direction = _tensor(_DIRECTIONS)[clips.motion.clamp(max=3)]  # [n, 2]
    half_path = HALF_PATH * scale * clips.speed
    line = (half_path[:, None] * direction)[:, None] * time[None, :, None]

    sign = _tensor(_TURN_SIGNS)[clips.motion]
    turns = clips.phase[:, None] + (sign * SLOWEST_TURNS * clips.speed)[:, None] * (time + 1) / 2
    angle = 2 * math.pi * turns
    orbit = ORBIT * scale * torch.stack([angle.cos(), angle.sin()], -1)

    circling = (clips.motion >= 4)[:, None]
    reach = torch.where(circling, _tensor(ORBIT * scale), half_path[:, None] * direction.abs())
    room = frame / 2 - (MARGIN * scale + RADIUS * scale * clips.size)[:, None] - reach
    return (frame / 2 + room * clips.place)[:, None] + torch.where(circling[..., None], orbit, line)


def _inside(
    shape: int,
    x: Float[Tensor, "n t 1 w"],
    y: Float[Tensor, "n t h 1"],
    r: Float[Tensor, "n 1 1 1"],
) -> Float[Tensor, "n t h w"]:
    """Return the distance to the edge of the shape in pixels, positive inside; the shape fits a box of side 2r."""
    if shape == 0:  # circle
        return r - torch.sqrt(x**2 + y**2)
    if shape == 1:  # square
        return 0.88 * r - torch.maximum(x.abs(), y.abs())
    if shape == 2:  # triangle, apex up: (0, -r), base corners (+-r, .8 r)
        return torch.minimum(0.8 * r - y, (r + y - 1.8 * x.abs()) / math.hypot(1, 1.8))
    along, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.minimum(r - along, 0.34 * r - across)  # cross


def coverage(clips: Clips, num_frames: int, height: int, width: int) -> Float[Tensor, "n t h w"]:
    """Return the share of each pixel that the object covers, in [0, 1]."""
    centre = centres(clips, num_frames, height, width)
    x = torch.arange(width) + 0.5 - centre[..., 0, None, None]
    y = (torch.arange(height) + 0.5)[:, None] - centre[..., 1, None, None]
    radius = (RADIUS * min(height, width) * clips.size)[:, None, None, None]
    out = torch.empty(len(clips), num_frames, height, width, dtype=FP32)
    for shape in clips.shape.unique().tolist():
        rows = clips.shape == shape
        out[rows] = (_inside(shape, x[rows], y[rows], radius[rows]) + 0.5).clamp(0, 1)
    return out


def render(
    clips: Clips, num_frames: int = 33, height: int = 64, width: int = 64
) -> Float[Tensor, "n 3 t h w"]:
    """Draw clips with values in [-1, 1]. One frame shows the middle of the motion."""
    mask = coverage(clips, num_frames, height, width)[:, None]
    colour, background = (
        _tensor(palette)[rows][:, :, None, None, None]
        for palette, rows in ((COLOUR_RGB, clips.colour), (BACKGROUND_RGB, clips.background))
    )
    return (background + (colour - background) * mask) * 2 - 1


def render_stills(clips: Clips, height: int = 64, width: int = 64) -> Float[Tensor, "n 3 h w"]:
    """Draw stills with values in [-1, 1]."""
    return render(clips, 1, height, width)[:, :, 0]
