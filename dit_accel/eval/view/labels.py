"""Names beside the points of a plot, where there is room for them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RADIUS = 6
"""Of a point's marker, in pixels."""
LETTER, LINE = 6.6, 14
"""Width and height of a letter, at most."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Label:
    """Text beside a point."""

    text: str
    x: float
    y: float
    anchor: str

    @property
    def box(self) -> Box:
        """The room it takes."""
        wide = LETTER * len(self.text)
        start = self.x - {"start": 0.0, "end": wide, "middle": wide / 2}[self.anchor]
        return start, self.y - LINE + 3, start + wide, self.y + 3


_PLACES = (
    (RADIUS + 5, -6, "start"),
    (RADIUS + 5, 16, "start"),
    (-RADIUS - 5, -6, "end"),
    (-RADIUS - 5, 16, "end"),
    (RADIUS + 5, 5, "start"),
    (-RADIUS - 5, 5, "end"),
    (0, -RADIUS - 8, "middle"),
    (0, RADIUS + 16, "middle"),
)
"""From a point to the text's corner or middle, in order of preference."""


def place_labels(
    points: Sequence[tuple[float, float, str]],
    line: Sequence[Box],
    bars: Sequence[Box],
    inside: Box,
) -> list[Label]:
    """A label right, left, above or below its point; none where there is no room.

    Args:
        points: x, y and text.
        line: what labels must not cover, besides points and each other.
        bars: what they cross only if there is no other way.
        inside: where they must lie.
    """
    labels: dict[int, Label] = {}
    full = [*line, *(around(x, y, RADIUS) for x, y, _ in points)]
    for avoid_bars in (True, False):
        for i, (x, y, text) in enumerate(points):
            if i in labels:
                continue
            for dx, dy, anchor in _PLACES:
                label = Label(text, round(x + dx, 2), round(y + dy, 2), anchor)
                box = label.box
                fits = box[0] >= inside[0] and box[1] >= inside[1]
                fits = fits and box[2] <= inside[2] and box[3] <= inside[3]
                others = [*full, *bars] if avoid_bars else full
                if fits and not any(overlap(box, other) for other in others):
                    full.append(box)
                    labels[i] = label
                    break
    return list(labels.values())


def along(line: Sequence[tuple[float, float]], pieces: int = 24) -> Iterator[Box]:
    """A line as small boxes."""
    for (x1, y1), (x2, y2) in itertools.pairwise(line):
        for i in range(1, pieces):
            yield around(x1 + (x2 - x1) * i / pieces, y1 + (y2 - y1) * i / pieces, 2)


def around(x: float, y: float, reach: int) -> Box:
    """The square about a point."""
    return x - reach, y - reach, x + reach, y + reach


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
