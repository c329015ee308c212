"""How many dense steps take the time of an accelerated run."""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence

from dit_accel.eval.runs.methods import DENSE, Method, dense_with
from dit_accel.eval.runs.timing import Stopwatch

ATTEMPTS = 3
"""Times that a nearer number of steps is tried; on a machine under load the search might never end."""


def seconds_of(measured: Mapping[int, float], steps: int) -> float:
    """Of dense sampling with `steps`: as measured, else on the line through two measurements about it, or
    through the only one and zero."""
    if steps in measured:
        return measured[steps]
    known = sorted(measured) if len(measured) > 1 else [0, *measured]
    i = min(max(bisect.bisect(known, steps), 1), len(known) - 1)
    low, high = known[i - 1], known[i]
    below = measured.get(low, 0.0)
    return below + (steps - low) / (high - low) * (measured[high] - below)


def nearest_steps(measured: Mapping[int, float], seconds: float, most: int) -> int:
    """The number of steps in [1, most] whose time is nearest; the fewer ones if two are equally near.

    Args:
        measured: seconds of dense sampling by number of steps, at least one.
    """
    return min(range(1, most + 1), key=lambda n: (abs(seconds_of(measured, n) - seconds), n))


def equal_time_steps(
    measured: Mapping[int, float],
    targets: Iterable[float],
    most: int,
    measure: Callable[[list[int]], Mapping[int, float]],
) -> list[int]:
    """For each target the measured number of steps whose time is nearest.

    Args:
        measured: seconds of dense sampling by number of steps, at least one.
        targets: seconds to meet.
        most: dense sampling itself takes `most + 1`.
        measure: gives the seconds of further numbers of steps.
    """
    measured, targets = dict(measured), list(targets)
    for _ in range(ATTEMPTS):
        wanted = {nearest_steps(measured, x, most) for x in targets} - set(measured)
        if not wanted:
            break
        measured |= measure(sorted(wanted))
    candidates = [n for n in sorted(measured) if n <= most]
    return [min(candidates, key=lambda n: (abs(measured[n] - x), n)) for x in targets]


def measure_equal_time(
    watch: Stopwatch,
    methods: Sequence[Method],
    repeats: int,
    *,
    steps: int,
    given: Sequence[Method] = (),
) -> dict[str, int]:
    """Measure the methods, and dense sampling with as many steps as take the time of each of them.

    All take turns: after one round the numbers of steps are about known, and join the others.

    Args:
        methods: dense sampling with `steps` >= 2 steps, and the accelerated ones.
        given: dense methods with fewer steps that are measured in any case.

    Returns:
        The numbers of steps by the names of the accelerated methods that take less time than dense sampling.
    """
    targets = [x for x in methods if x.kind != "dense"]
    watch.run([*methods, *given], 1)
    # Of the first round only, also where more are known: a run that goes on must guess as it did.
    known = {steps: watch.seconds(DENSE, 1)}
    guesses = [
        dense_with(nearest_steps(known, watch.seconds(x, 1), steps - 1))
        for x in targets
        if watch.seconds(x, 1) < known[steps]
    ]
    fewer = list({x.name: x for x in [*given, *guesses]}.values())
    watch.run([*methods, *fewer], repeats)

    def measure(numbers: list[int]) -> dict[int, float]:
        more = [dense_with(n) for n in numbers]
        watch.run(more, repeats)
        return {n: watch.seconds(x) for n, x in zip(numbers, more, strict=True)}

    measured = {steps: watch.seconds(DENSE)}
    measured |= {x.num_inference_steps: watch.seconds(x) for x in fewer if x.num_inference_steps}
    # Where acceleration takes longer than dense sampling, fewer steps never take as long.
    targets = [x for x in targets if watch.seconds(x) < watch.seconds(DENSE)]
    times = [watch.seconds(x) for x in targets]
    found = equal_time_steps(measured, times, steps - 1, measure)
    return {x.name: n for x, n in zip(targets, found, strict=True)}


def measure_all(
    watch: Stopwatch,
    methods: Sequence[Method],
    fewer: Sequence[Method],
    repeats: int,
    *,
    steps: int,
) -> tuple[list[Method], dict[str, int]]:
    """Measure methods, and dense sampling with fewer steps.

    Args:
        methods: dense sampling with `steps` steps, and the accelerated ones.
        fewer: dense ones with their numbers of steps; one without a number stands for those that take the
            time of each accelerated method.

    Returns:
        All dense methods with fewer steps, the most steps first; and the numbers at equal time, by the
        accelerated method's name.
    """
    given = [x for x in fewer if x.num_inference_steps is not None]
    found: dict[str, int] = {}
    if len(given) == len(fewer) or len(methods) == 1:
        watch.run([*methods, *given], repeats)
    else:
        found = measure_equal_time(watch, methods, repeats, steps=steps, given=given)
    numbers = {x.num_inference_steps or 0 for x in given} | {*found.values()}
    return [dense_with(n) for n in sorted(numbers, reverse=True)], found
