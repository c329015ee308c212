"""`allocate`: chooses a candidate for each head so that the total error is small at a total cost."""

import heapq
from collections.abc import Sequence

DENSE = -1
"""Index of dense attention, which has cost 1 and error 0."""


def allocate(
    costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """Return the index of the chosen candidate of each head.

    The algorithm is greedy. Each head starts with its cheapest candidate. Then the change with the largest error reduction
    per cost is applied, until the budget is spent. Only candidates on the lower convex hull of a head are considered, so
    that a poor candidate does not block the way to an expensive but good one.

    Args:
        costs: cost of each candidate of each head, relative to dense attention.
        errors: error of each candidate of each head. A head without candidates stays dense.
        budget: allowed mean cost over the heads.

    Returns:
        Index of a candidate for each head, or `DENSE` for dense attention.

    Raises:
        ValueError: the cheapest candidates cost more than the budget.
    """
    hulls = [_hull(c, e) for c, e in zip(costs, errors, strict=True)]
    spent = sum(hull[0][0] for hull in hulls)
    limit = budget * len(hulls)
    if spent > limit + 1e-9:
        raise ValueError(
            f"density={budget:g}: must be in [{spent / len(hulls):.3f}, 1], because the cheapest candidates already read "
            "that much"
        )
    at = [0] * len(hulls)
    waiting: list[tuple[float, int]] = []

    def push(head: int) -> None:
        if at[head] + 1 < len(hulls[head]):
            (c, e, _), (dearer, better, _) = hulls[head][at[head] : at[head] + 2]
            heapq.heappush(waiting, (-(e - better) / max(dearer - c, 1e-12), head))

    for head in range(len(hulls)):
        push(head)
    while waiting:
        _, head = heapq.heappop(waiting)
        step = hulls[head][at[head] + 1][0] - hulls[head][at[head]][0]
        if spent + step > limit + 1e-9:
            continue  # a cheaper change of another head may still fit
        spent += step
        at[head] += 1
        push(head)
    return [hull[i][2] for hull, i in zip(hulls, at, strict=True)]


def _hull(costs: Sequence[float], errors: Sequence[float]) -> list[tuple[float, float, int]]:
    """Return cost, error and index of the candidates on the lower convex hull, cheapest first. Dense is the last one."""
    points = sorted([*((c, e, i) for i, (c, e) in enumerate(zip(costs, errors, strict=True))), (1.0, 0.0, DENSE)])  # fmt: skip
    hull: list[tuple[float, float, int]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # more expensive and not better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    """Return the change of the error per cost, which is negative."""
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-12)
