"""Stills: one frame of a clip, and a caption without the motion.

Of the (shape, colour, background) combinations a tenth is held out, by the rule that holds out
(shape, colour, motion) in the clips: there are as many backgrounds as motions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..clips import Clips, Placement, describe_clips, render
from ..vocabulary import BACKGROUNDS, MOTIONS, TEMPLATES, Combination, combinations

assert len(BACKGROUNDS) == len(MOTIONS)

HEIGHT, WIDTH = 64, 64  # 16 x 16 = 256 latent tokens
_STRAIGHT = 4  # the first motions; those after them circle, so their frames lie off the middle
PLACEMENT = Placement(spread=0.4, phase=0.0)  # what the model makes
ANYWHERE = Placement(spread=1.0, phase=1.0)  # for the VAE, which should be at home in the frame
# The templates whose captions say what the background is.
_NAMING = torch.tensor([t for t, text in enumerate(TEMPLATES) if "{background}" in text])


class StillCombination(NamedTuple):
    """Indices into SHAPES, COLOURS and BACKGROUNDS."""

    shape: int
    colour: int
    background: int


def still_combinations(split: str = "all") -> list[StillCombination]:
    """All combinations of a split: "train" (90 %), "heldout" (10 %) or "all"."""
    return [StillCombination(*c) for c in combinations(split)]


def describe_stills(
    chosen: list[StillCombination],
    generator: torch.Generator,
    placement: Placement = PLACEMENT,
    naming: bool = False,
) -> Clips:
    """Stills of the given combinations; everything else is drawn from `generator`: the middles of
    straight motions, and, unless the phase is 0, points of circles. With `naming`, all
    captions name the background."""
    motions = len(MOTIONS) if placement.phase else _STRAIGHT
    motion = torch.randint(motions, (len(chosen),), generator=generator).tolist()
    clips = describe_clips(
        [Combination(c.shape, c.colour, m) for c, m in zip(chosen, motion, strict=True)],
        generator,
        placement,
    )
    background = torch.tensor([c.background for c in chosen], dtype=torch.long)
    template = _NAMING[clips.template % len(_NAMING)] if naming else clips.template
    return replace(clips, background=background, template=template)


def draw_stills(
    count: int,
    generator: torch.Generator,
    split: str = "train",
    placement: Placement = PLACEMENT,
) -> Clips:
    """Describes `count` stills of a split, every choice uniform and drawn from `generator`."""
    allowed = still_combinations(split)
    chosen = torch.randint(len(allowed), (count,), generator=generator).tolist()
    return describe_stills([allowed[i] for i in chosen], generator, placement)


def render_stills(
    clips: Clips, height: int = HEIGHT, width: int = WIDTH
) -> Float[Tensor, "n 3 h w"]:
    """Draws the stills; values in [-1, 1]."""
    return render(clips, 1, height, width)[:, :, 0]
