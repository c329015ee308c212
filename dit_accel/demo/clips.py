"""Procedural clips: one anti-aliased shape moving over a plain background, drawn in batches.

Lengths are fractions of S = min(height, width), and a clip of any number of frames shows the whole
motion, so the same description can be drawn at any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .vocabulary import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    TEMPLATES,
    Combination,
    caption,
    combinations,
)

RADIUS = 0.14  # of the smallest object; the largest has twice that
HALF_PATH = (
    0.10  # half the distance the slowest object travels on a line; the fastest travels twice that
)
ORBIT = 0.17  # radius of the circle that circling objects follow
SLOWEST_TURNS = (
    0.6  # turns the slowest circling object makes in a clip; the fastest makes twice that
)
MARGIN = 0.02  # always left free at the frame's edge

_LINE_DIRECTION = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))  # y points down
_TURN_SIGN = {4: 1.0, 5: -1.0}  # clockwise on screen is a growing angle, as y points down


class Placement(NamedTuple):
    """How freely a clip's path is placed."""

    spread: float
    """Share of the room around the path over which its centre varies."""
    phase: float
    """Turns over which the starting angle of circling objects varies, from the rightmost point on."""


# Nearly central paths keep the clips simple enough for a model that trains in under an hour.
CENTRAL = Placement(spread=0.2, phase=0.125)
# For the VAE, which should be at home in the whole frame.
ANYWHERE = Placement(spread=0.75, phase=1.0)


@dataclass(frozen=True)
class Clips:
    """A batch of clip descriptions, one entry a clip."""

    shape: Int[Tensor, " n"]
    colour: Int[Tensor, " n"]
    motion: Int[Tensor, " n"]
    background: Int[Tensor, " n"]
    template: Int[Tensor, " n"]
    size: Float[Tensor, " n"]
    """In [1, 2]: the object's radius is `RADIUS * size` of the shorter side."""
    speed: Float[Tensor, " n"]
    """In [1, 2], with 1 the slowest."""
    place: Float[Tensor, "n 2"]
    """In [-1, 1]: where in the room it has the path's centre lies (x, y)."""
    phase: Float[Tensor, " n"]
    """In [0, 1): the starting angle of circling objects, in turns."""

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice) -> Clips:
        return Clips(*(getattr(self, field.name)[rows] for field in fields(self)))

    def captions(self, with_motion: bool = True) -> list[str]:
        """One caption a clip, or, without the motion, a still."""
        labels = torch.stack(
            [self.shape, self.colour, self.motion, self.background, self.template], 1
        )
        return [
            caption(Combination(s, c, m), b, t, with_motion) for s, c, m, b, t in labels.tolist()
        ]


def draw_clips(
    count: int,
    generator: torch.Generator,
    split: str = "train",
    placement: Placement = CENTRAL,
) -> Clips:
    """Describes `count` clips of a split, every choice uniform and drawn from `generator` (on CPU)."""
    allowed = combinations(split)
    chosen = torch.randint(len(allowed), (count,), generator=generator).tolist()
    return describe_clips([allowed[i] for i in chosen], generator, placement)


def describe_clips(
    chosen: list[Combination], generator: torch.Generator, placement: Placement = CENTRAL
) -> Clips:
    """Clips of the given combinations; everything else is drawn from `generator`."""
    count = len(chosen)
    shape, colour, motion = torch.tensor(chosen, dtype=torch.long).reshape(count, 3).unbind(1)
    background = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    template = torch.randint(len(TEMPLATES), (count,), generator=generator)
    size, speed, x, y, phase = torch.rand(5, count, generator=generator, dtype=torch.float32)
    return Clips(
        shape,
        colour,
        motion,
        background,
        template,
        size=1 + size,
        speed=1 + speed,
        place=placement.spread * (torch.stack([x, y], 1) * 2 - 1),
        phase=placement.phase * phase,
    )


def centres(clips: Clips, num_frames: int, height: int, width: int) -> Float[Tensor, "n t 2"]:
    """Where the object is in each frame: (x, y) in pixels, a pixel's centre being at +.5."""
    scale = min(height, width)
    time = (
        torch.linspace(-1, 1, num_frames, dtype=torch.float32)
        if num_frames > 1
        else torch.zeros(1, dtype=torch.float32)
    )
    direction = torch.tensor(_LINE_DIRECTION, dtype=torch.float32)[
        clips.motion.clamp(max=3)
    ]  # [n, 2]
    half_path = HALF_PATH * scale * clips.speed
    line = (half_path[:, None] * direction)[:, None] * time[None, :, None]

    sign = torch.tensor([_TURN_SIGN.get(m, 0.0) for m in range(6)], dtype=torch.float32)[
        clips.motion
    ]
    turns = clips.phase[:, None] + (sign * SLOWEST_TURNS * clips.speed)[:, None] * (time + 1) / 2
    angle = 2 * math.pi * turns
    orbit = ORBIT * scale * torch.stack([angle.cos(), angle.sin()], -1)

    circling = (clips.motion >= 4)[:, None]
    path = torch.where(circling[..., None], orbit, line)
    reach = torch.where(
        circling,
        torch.tensor(ORBIT * scale, dtype=torch.float32),
        half_path[:, None] * direction.abs(),
    )
    room = (
        torch.tensor([width, height], dtype=torch.float32) / 2
        - (MARGIN * scale + RADIUS * scale * clips.size)[:, None]
        - reach
    )
    middle = torch.tensor([width, height], dtype=torch.float32) / 2 + room * clips.place
    return middle[:, None] + path


def _inside(
    shape: int,
    x: Float[Tensor, "n t 1 w"],
    y: Float[Tensor, "n t h 1"],
    r: Float[Tensor, "n 1 1 1"],
) -> Float[Tensor, "n t h w"]:
    """Distance in pixels to the shape's edge, positive inside; the shape fits a box of side 2r."""
    if shape == 0:  # circle
        return r - torch.sqrt(x**2 + y**2)
    if shape == 1:  # square
        return 0.88 * r - torch.maximum(x.abs(), y.abs())
    if shape == 2:  # triangle, apex up: (0, -r), base corners (+-r, .8 r)
        return torch.minimum(0.8 * r - y, (r + y - 1.8 * x.abs()) / math.hypot(1, 1.8))
    along, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.minimum(r - along, 0.34 * r - across)  # cross


def coverage(clips: Clips, num_frames: int, height: int, width: int) -> Float[Tensor, "n t h w"]:
    """The share of each pixel that the object covers, in [0, 1] (anti-aliased)."""
    centre = centres(clips, num_frames, height, width)
    x = torch.arange(width) + 0.5 - centre[..., 0, None, None]
    y = (torch.arange(height) + 0.5)[:, None] - centre[..., 1, None, None]
    radius = (RADIUS * min(height, width) * clips.size)[:, None, None, None]
    out = torch.empty(len(clips), num_frames, height, width, dtype=torch.float32)
    for shape in clips.shape.unique().tolist():
        rows = clips.shape == shape
        out[rows] = (_inside(shape, x[rows], y[rows], radius[rows]) + 0.5).clamp(0, 1)
    return out


def render(
    clips: Clips, num_frames: int = 33, height: int = 64, width: int = 64
) -> Float[Tensor, "n 3 t h w"]:
    """Draws the clips; values in [-1, 1]. One frame shows the middle of the motion."""
    mask = coverage(clips, num_frames, height, width)[:, None]
    colour = torch.tensor(COLOUR_RGB, dtype=torch.float32)[clips.colour][:, :, None, None, None]
    background = torch.tensor(BACKGROUND_RGB, dtype=torch.float32)[clips.background][
        :, :, None, None, None
    ]
    return (background + (colour - background) * mask) * 2 - 1
