"""Vocabulary of the procedural data set: labels, colours, captions and held-out combinations."""

from itertools import product
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
MOTIONS = (
    *("moving right", "moving left", "moving down", "moving up"),
    *("circling clockwise", "circling counterclockwise"),
)
BACKGROUNDS = ("black", "gray", "navy", "maroon", "teal", "brown")
LABELS = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}

# RGB in [0, 1]. Two object colours are at least 0.35 apart, an object colour and a background at
# least 0.45.
COLOUR_RGB = (
    (0.93, 0.12, 0.12),
    (0.15, 0.78, 0.20),
    (0.15, 0.30, 0.98),
    (0.98, 0.92, 0.15),
    (0.62, 0.15, 0.85),
    (0.15, 0.88, 0.93),
    (0.98, 0.52, 0.06),
    (0.96, 0.96, 0.96),
)
BACKGROUND_RGB = (
    (0.04, 0.04, 0.05),
    (0.36, 0.36, 0.38),
    (0.05, 0.07, 0.30),
    (0.30, 0.05, 0.09),
    (0.04, 0.27, 0.27),
    (0.30, 0.19, 0.09),
)

TEMPLATES = (
    "{article} {colour} {shape} {motion}",
    "{colour} {shape} {motion}",
    "{article} {colour} {shape} {motion} on a {background} background",
    "{article} {colour} {shape} is {motion} on a {background} background",
    "on a {background} background, {article} {colour} {shape} {motion}",
)

SPLITS = ("train", "heldout", "all")


class Combination(NamedTuple):
    """Indices into SHAPES, COLOURS and MOTIONS."""

    shape: int
    colour: int
    motion: int


def combinations(split: str = "all") -> list[Combination]:
    """Return the combinations of a split: "train" (90 %), "heldout" (10 %) or "all".

    A fixed arithmetic rule instead of a random draw makes the split equal for every seed, version
    and machine. It leaves every pair of values in the training split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
    every = [Combination(*x) for x in product(*map(range, map(len, (SHAPES, COLOURS, MOTIONS))))]
    held_out = {x for x in every if (2 * x.shape + x.colour + 3 * x.motion) % 10 == 1}
    return [x for x in every if split == "all" or (x in held_out) == (split == "heldout")]


def caption(
    combination: Combination, background: int, template: int, with_motion: bool = True
) -> str:
    """Return the caption of a clip, or of a still.

    Args:
        combination: shape, colour and motion.
        background: index into BACKGROUNDS.
        template: index into TEMPLATES.
        with_motion: False for a still, whose caption leaves the motion out.
    """
    colour = COLOURS[combination.colour]
    text = TEMPLATES[template].format(
        article="an" if colour[0] in "aeiou" else "a",
        colour=colour,
        shape=SHAPES[combination.shape],
        motion=MOTIONS[combination.motion] if with_motion else "",
        background=BACKGROUNDS[background],
    )
    return " ".join(text.split())  # collapses the gap that a missing motion leaves
