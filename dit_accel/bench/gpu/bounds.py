"""Bounds of the measured numbers, and the verdicts of a run."""

from typing import Any, NamedTuple

from dit_accel.bench.gpu.cases import WAN
from dit_accel.bench.gpu.device import Result


class Bound(NamedTuple):
    """A number in the result of a sub-step, and its smallest accepted value."""

    name: str
    sub_step: str
    path: tuple[str, ...]
    least: float


def _speed(mode: str, function: str, least: float) -> Bound:
    return Bound(
        f"{mode}, {function}: times flash at 5 %",
        f"speed/{WAN.name}, 5%, {mode}",
        ("ratios", function, "x_flash"),
        least,
    )


BOUNDS = (
    _speed("none", "kernel", 22.0),
    *(_speed(mode, "graph", 15.0) for mode in ("none", "all")),
    *(_speed(mode, "eager", 12.0) for mode in ("none", "all")),
    *(
        _speed(mode, x, 9.0)
        for mode in ("complement", "shared_softmax")
        for x in ("graph", "eager")
    ),
    Bound(
        "none, backward: times flash at 5 %", f"backward/{WAN.name}, 5%, none", ("x_flash",), 10.0
    ),
    Bound(
        "none, kernel: rate per attended operation over the dense yardstick",
        f"speed/{WAN.name}, 5%, none",
        ("ratios", "kernel", "of_yardstick"),
        0.85,
    ),
)


def verdicts(results: dict[str, Result]) -> list[dict[str, Any]]:
    """Return the name, smallest accepted value, measured value and verdict of each bound.

    The verdict is "met", "missed" or "not measured".
    """
    found = []
    for bound in BOUNDS:
        value: Any = results.get(bound.sub_step)
        for key in bound.path:
            value = value.get(key) if isinstance(value, dict) else None
        measured = isinstance(value, int | float) and value > 0
        verdict = ("met" if value >= bound.least else "missed") if measured else "not measured"
        found.append(
            {
                "bound": bound.name,
                "least": bound.least,
                "value": value if measured else None,
                "verdict": verdict,
            }
        )
    return found
