"""Judge of clips: names colour and motion by analysis of the pixels, and the shape by a small CNN.

A judgement is an index into the vocabulary, or -1 where the clip shows none of its values clearly. The CNN is
trained on clean drawings and never sees generated clips.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dit_accel.files import asset

from .clips import FP32, HALF_PATH, ORBIT, SLOWEST_TURNS
from .vocabulary import BACKGROUND_RGB, COLOUR_RGB, SHAPES

UNKNOWN = -1
_COLOUR_LIMIT, _BACKGROUND_LIMIT = 0.3, 0.15  # largest RGB distance from a named colour
_KNOTS = 9  # points that a trajectory is averaged down to
_STRAIGHT = 0.7  # smallest net displacement over path length of a straight motion
_CIRCLING = math.radians(90)  # smallest total turn of a circling motion; the slowest turns by 168
_SHAPE_FRAMES = 9  # most frames that the CNN sees
_CROP = 24  # pixels per side of the CNN's input
_WINDOW = 2.4  # side of a crop over the square root of the object's area; every shape fits


class ShapeJudge(nn.Module):
    """CNN of 20 k parameters: crops of a mask, centred and scaled to the object -> a score for each of SHAPES."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 24, 2), (24, 32, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU()]
        last = nn.Linear(32 * (_CROP // 4) ** 2, len(SHAPES))
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)

    def forward(self, crops: Float[Tensor, "n 1 c c"]) -> Float[Tensor, "n k"]:
        return self.layers(crops)


def centroids(mask: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b 2"]:
    """Return the centre of mass (x, y) in pixels. Pixel i has its centre at i + 0.5."""
    x, y = (torch.arange(size) + 0.5 for size in (mask.shape[-1], mask.shape[-2]))
    area = mask.sum((-2, -1)).clamp_min(1e-3)
    moments = torch.stack([(mask.sum(-2) * x).sum(-1), (mask.sum(-1) * y).sum(-1)], -1)
    return moments / area[..., None]


def crop_objects(mask: Float[Tensor, "n h w"]) -> Float[Tensor, "n 1 c c"]:
    """Return square views of the objects, centred on their centres of mass and scaled by their areas."""
    size = torch.tensor(mask.shape[:0:-1], dtype=FP32)  # width, height
    half = 0.5 * _WINDOW * mask.sum((1, 2)).clamp_min(4.0).sqrt()
    theta = torch.zeros(len(mask), 2, 3, dtype=FP32)
    theta[:, 0, 0], theta[:, 1, 1] = (half[:, None] * 2 / size).unbind(1)
    theta[:, :, 2] = centroids(mask) * 2 / size - 1
    grid = F.affine_grid(theta, [len(mask), 1, _CROP, _CROP], align_corners=False)
    return F.grid_sample(mask[:, None], grid, align_corners=False)


def load_shape_judge() -> ShapeJudge:
    """Return the trained CNN that comes with the package."""
    from safetensors.torch import load_file

    judge = ShapeJudge()
    weights = load_file(asset("judge.safetensors"))
    judge.load_state_dict({name: value.float() for name, value in weights.items()})
    return judge.eval().requires_grad_(False)


class Judgement(NamedTuple):
    """Indices that name the content of clips, one entry per clip; -1 is "none of them"."""

    shape: Int[Tensor, " n"]
    colour: Int[Tensor, " n"]
    motion: Int[Tensor, " n"]
    background: Int[Tensor, " n"]


def _nearest(
    rgb: Float[Tensor, "n 3"], palette: tuple[tuple[float, ...], ...], limit: float
) -> Int[Tensor, " n"]:
    distance, index = torch.cdist(rgb, torch.tensor(palette, dtype=FP32)).min(1)
    return torch.where(distance < limit, index, UNKNOWN)


def separate_object(
    video: Float[Tensor, "n 3 t h w"],
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"], Float[Tensor, "n t h w"]]:
    """Return the object's colour, the background's colour (RGB in [0, 1]) and a soft mask of the object.

    The background is the median over the border of the frame. The object's colour is the mean over the
    pixels that differ most from the background.
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
    """Name the motion of trajectories.

    A path that turns by more than 90 degrees in total is circling, and the sign of the turn is its sense. A
    straight enough path moves in the direction of its larger displacement. Shorter paths than half of the
    slowest clip's have no motion.

    Args:
        centre: positions in pixels.
        scale: shorter side of the frame in pixels.
    """
    frames = centre.shape[1]
    if frames < 4:
        return torch.full((len(centre),), UNKNOWN)
    knots = F.adaptive_avg_pool1d(centre.transpose(1, 2), min(frames, _KNOTS))
    knots = knots.transpose(1, 2) / scale
    steps = knots.diff(dim=1)
    turn = torch.atan2(steps[..., 1], steps[..., 0]).diff(dim=1)
    turning = torch.remainder(turn + math.pi, 2 * math.pi).sub(math.pi).sum(1)
    path, net = steps.norm(dim=-1).sum(1), knots[:, -1] - knots[:, 0]
    bends, moved = turning.abs() > _CIRCLING, net.norm(dim=1)

    circles = bends & (path > 0.5 * SLOWEST_TURNS * 2 * math.pi * ORBIT)
    straight = ~bends & (moved > HALF_PATH) & (moved > _STRAIGHT * path)
    sideways = net[:, 0].abs() > net[:, 1].abs()
    line = torch.where(sideways, torch.where(net[:, 0] > 0, 0, 1), torch.where(net[:, 1] > 0, 2, 3))
    circle = torch.where(turning > 0, 4, 5)
    return torch.where(circles, circle, torch.where(straight, line, UNKNOWN))


@torch.no_grad()
def judge_clips(
    video: Float[Tensor, "n 3 t h w"], shape_judge: ShapeJudge | None = None
) -> Judgement:
    """Judge clips with values in [-1, 1].

    The CNN sees up to 9 frames. The shape with the highest mean probability must have more than half of it.

    Args:
        video: clips; stills have one frame.
        shape_judge: Default: the trained CNN that comes with the package.
    """
    shape_judge = shape_judge or load_shape_judge()
    colour, background, mask = separate_object(video.cpu())
    count, frames, height, width = mask.shape
    seen = torch.linspace(0, frames - 1, min(frames, _SHAPE_FRAMES), dtype=FP32).round().long()
    crops = crop_objects(mask[:, seen].flatten(0, 1))
    share, shape = shape_judge(crops).softmax(-1).unflatten(0, (count, len(seen))).mean(1).max(1)
    return Judgement(
        shape=torch.where(share > 0.5, shape, UNKNOWN),
        colour=_nearest(colour, COLOUR_RGB, _COLOUR_LIMIT),
        motion=judge_motion(centroids(mask), min(height, width)),
        background=_nearest(background, BACKGROUND_RGB, _BACKGROUND_LIMIT),
    )
