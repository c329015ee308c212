"""Judges clips without the model: colour and motion by analysis of the pixels, shape by a small
CNN.

A judgement is an index into the vocabulary, or -1 where the clip shows none of its values clearly
enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .clips import HALF_PATH, ORBIT, SLOWEST_TURNS
from .shape_judge import ShapeJudge, centroids, crop_objects, load_shape_judge
from .vocabulary import BACKGROUND_RGB, COLOUR_RGB

UNKNOWN = -1
_COLOUR_LIMIT = 0.3  # farther than this from every colour (RGB distance) is none of them
_BACKGROUND_LIMIT = 0.15
_KNOTS = 9  # points that a trajectory is averaged down to
_STRAIGHT = 0.7  # net displacement over path length of a line
_CIRCLING = math.radians(
    90
)  # total turning from which a path is a circle; the slowest circling clip turns 168
_SHAPE_FRAMES = 9


@dataclass(frozen=True)
class Judgement:
    """What the clips show, one entry a clip; -1 is "none of them"."""

    shape: Int[Tensor, " n"]
    colour: Int[Tensor, " n"]
    motion: Int[Tensor, " n"]
    background: Int[Tensor, " n"]


def _nearest(
    rgb: Float[Tensor, "n 3"], palette: tuple[tuple[float, ...], ...], limit: float
) -> Int[Tensor, " n"]:
    distance, index = torch.cdist(rgb, torch.tensor(palette, dtype=torch.float32)).min(1)
    return torch.where(distance < limit, index, UNKNOWN)


def separate_object(
    video: Float[Tensor, "n 3 t h w"],
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"], Float[Tensor, "n t h w"]]:
    """The object's colour, the background's colour (RGB in [0, 1]) and a soft mask of the object.

    The background is the median over the frame's border; the object's colour the mean over the
    pixels that differ most from it.
    """
    rgb = (video.float().clamp(-1, 1) + 1) / 2
    edge = torch.cat([rgb[..., 0, :], rgb[..., -1, :], rgb[..., :, 0], rgb[..., :, -1]], -1)
    background = edge.flatten(2).median(-1).values
    difference = rgb - background[:, :, None, None, None]
    contrast = difference.norm(dim=1)  # [n, t, h, w]
    strongest = contrast.flatten(2).amax(2).median(1).values.clamp_min(1e-3)  # of the median frame
    core = (contrast > 0.75 * strongest[:, None, None, None]).float()[:, None]
    colour = (rgb * core).sum((2, 3, 4)) / core.sum((2, 3, 4)).clamp_min(1)
    direction = colour - background
    mask = (difference * direction[:, :, None, None, None]).sum(1)
    mask = (mask / direction.square().sum(1).clamp_min(1e-4)[:, None, None, None]).clamp(0, 1)
    return colour, background, torch.where(mask > 0.2, mask, 0.0)


def judge_motion(centre: Float[Tensor, "n t 2"], scale: int) -> Int[Tensor, " n"]:
    """Names the motion of trajectories given in pixels; `scale` is the frame's shorter side.

    A path that turns by more than 90 degrees in all is circling, its sign the sense; a straight
    enough one goes the way of its larger displacement. Both must cover half of what the slowest
    clip covers.
    """
    frames = centre.shape[1]
    if frames < 4:
        return torch.full((len(centre),), UNKNOWN)
    knots = (
        F.adaptive_avg_pool1d(centre.transpose(1, 2), min(frames, _KNOTS)).transpose(1, 2) / scale
    )
    steps = knots.diff(dim=1)
    heading = torch.atan2(steps[..., 1], steps[..., 0])
    turn = heading.diff(dim=1)
    turning = torch.remainder(turn + math.pi, 2 * math.pi).sub(math.pi).sum(1)
    path = steps.norm(dim=-1).sum(1)
    net = knots[:, -1] - knots[:, 0]

    circles = (turning.abs() > _CIRCLING) & (path > 0.5 * SLOWEST_TURNS * 2 * math.pi * ORBIT)
    straight = (net.norm(dim=1) > HALF_PATH) & (net.norm(dim=1) > _STRAIGHT * path)
    sideways = net[:, 0].abs() > net[:, 1].abs()
    line = torch.where(sideways, torch.where(net[:, 0] > 0, 0, 1), torch.where(net[:, 1] > 0, 2, 3))
    circle = torch.where(turning > 0, 4, 5)
    return torch.where(
        circles, circle, torch.where(straight & (turning.abs() <= _CIRCLING), line, UNKNOWN)
    )


@torch.no_grad()
def judge_clips(
    video: Float[Tensor, "n 3 t h w"], shape_judge: ShapeJudge | None = None
) -> Judgement:
    """Judges clips with values in [-1, 1]; `shape_judge` defaults to the committed one.

    The shape is the CNN's mean opinion over up to 9 frames, and must win more than half of it.
    """
    shape_judge = shape_judge or load_shape_judge()
    colour, background, mask = separate_object(video.cpu())
    count, frames, height, width = mask.shape
    motion = judge_motion(centroids(mask), min(height, width))
    seen = (
        torch.linspace(0, frames - 1, min(frames, _SHAPE_FRAMES), dtype=torch.float32)
        .round()
        .long()
    )
    crops = crop_objects(mask[:, seen].flatten(0, 1))
    opinion = shape_judge(crops).softmax(-1).unflatten(0, (count, len(seen))).mean(1)
    share, shape = opinion.max(1)
    return Judgement(
        shape=torch.where(share > 0.5, shape, UNKNOWN),
        colour=_nearest(colour, COLOUR_RGB, _COLOUR_LIMIT),
        motion=motion,
        background=_nearest(background, BACKGROUND_RGB, _BACKGROUND_LIMIT),
    )
