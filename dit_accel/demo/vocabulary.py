"""What a clip can show and how a caption says it: the words, the colours, and the held-out
combinations."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
MOTIONS = (
    "moving right",
    "moving left",
    "moving down",
    "moving up",
    "circling clockwise",
    "circling counterclockwise",
)
BACKGROUNDS = ("black", "gray", "navy", "maroon", "teal", "brown")

# RGB in [0, 1]. Any two shape colours are at least .35 apart, any shape colour and background at
# least .45.
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

# Two templates leave the background open, three name it.
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


def is_held_out(combination: Combination) -> bool:
    """Whether training never shows this (shape, colour, motion).

    A fixed arithmetic rule rather than a random draw, so that it is the same for every seed,
    version and machine; it spreads the held-out combinations evenly, so every pair of values is
    still trained on.
    """
    shape, colour, motion = combination
    return (2 * shape + colour + 3 * motion) % 10 == 1


def combinations(split: str = "all") -> list[Combination]:
    """All (shape, colour, motion) combinations of a split: "train" (90 %), "heldout" (10 %) or
    "all"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    everything = [
        Combination(*c)
        for c in product(range(len(SHAPES)), range(len(COLOURS)), range(len(MOTIONS)))
    ]
    if split == "all":
        return everything
    return [c for c in everything if is_held_out(c) == (split == "heldout")]


def caption(
    combination: Combination, background: int, template: int, with_motion: bool = True
) -> str:
    """The caption of a clip; `background` and `template` index BACKGROUNDS and TEMPLATES. Without
    the motion it is that of a still."""
    colour = COLOURS[combination.colour]
    text = TEMPLATES[template].format(
        article="an" if colour[0] in "aeiou" else "a",
        colour=colour,
        shape=SHAPES[combination.shape],
        motion=MOTIONS[combination.motion] if with_motion else "",
        background=BACKGROUNDS[background],
    )
    return " ".join(text.split())  # the motion left a gap
