"""`Criteria`: rules for the number of kept and skipped blocks of a row, and for blocks that are always kept."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel.kernels.geometry import Rules

MASS_BITS = 21
"""Number of fractional bits of the softmax mass `top_p`, as a fixed-point integer."""


@dataclass(frozen=True)
class Criteria:
    """Rules that select the blocks of a row. Each criterion keeps the best n blocks; criteria differ only in n."""

    best: int = 1
    """Minimum number of kept blocks."""
    limit: int | None = None
    """Maximum number of kept blocks, without forced ones. None: no limit."""
    top_p: float | None = None
    threshold: float | None = None
    skip: int | None = None
    """Number of worst blocks that are skipped. None: no skip lists."""
    sink_blocks: int = 0
    """Number of first blocks that every row reads in addition."""
    diagonal: int | None = None
    """Number of blocks on either side of a row's own positions that it reads in addition. None: none."""

    @property
    def mass(self) -> int | None:
        """`top_p` in units of `2**-MASS_BITS`."""
        return None if self.top_p is None else max(1, round(self.top_p * 2**MASS_BITS))

    def most(self, rules: Rules, n: int, tail_blocks: int) -> int | None:
        """Return the maximum number of blocks that a row reads, or None if it depends on the scores.

        Args:
            rules: lengths, blocks and visibility rules.
            n: number of blocks with a score.
            tail_blocks: number of blocks without a score.
        """
        kept = self.limit
        if self.top_p is None and self.threshold is None:
            kept = self.best
        if kept is None or (self.diagonal is not None and rules.q_order is not None):
            return None
        near = 0
        if self.diagonal is not None:
            near = 2 * self.diagonal + 1 + math.ceil(rules.block_q / rules.block_k)
        return torch.sym_min(kept + self.sink_blocks + near, n) + tail_blocks


def _criteria(
    n: int,
    *,
    topk: float | None = None,
    count: int | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    skip: float = 0.0,
    limit: float | None = None,
    sink_blocks: int = 0,
    diagonal: int | None = None,
) -> Criteria:
    """Return the criteria from the arguments of `SparsePlan.from_scores`, after checking them. Fractions are of `n` blocks."""
    chosen = [
        name
        for name, x in (
            ("topk", topk),
            ("count", count),
            ("top_p", top_p),
            ("threshold", threshold),
        )
        if x is not None
    ]
    alone = "threshold" in chosen or {"topk", "count"} <= {*chosen}
    if not chosen or (alone and len(chosen) > 1):
        raise ValueError(
            f"topk, top_p, threshold: got {chosen or 'none'}; accepted are topk (or count), top_p, both, "
            "or threshold alone"
        )
    if count is not None and not 1 <= count <= n:
        raise ValueError(f"count={count}: accepted is an int between 1 and the {n} blocks")
    for name, x in (("topk", topk), ("top_p", top_p), ("limit", limit)):
        if x is not None and not 0 < x <= 1:
            raise ValueError(f"{name}={x}: accepted is a fraction in (0, 1]")
    if not 0 <= skip < 1:
        raise ValueError(f"skip={skip}: accepted is a fraction in [0, 1)")
    if limit is not None and chosen in (["topk"], ["count"]):
        raise ValueError(f"limit={limit}: accepted with top_p or threshold; topk is a limit itself")
    if limit is not None and topk is not None and limit < topk:
        raise ValueError(f"limit={limit}: accepted is a fraction of at least topk={topk}")
    if limit is not None and count is not None and topk_blocks(limit, n) < count:
        raise ValueError(f"limit={limit}: accepted is a fraction of at least count={count} blocks")
    for name, number in (("sink_blocks", sink_blocks), ("diagonal", diagonal)):
        if number is not None and (not isinstance(number, int | torch.SymInt) or number < 0):
            raise ValueError(f"{name}={number}: accepted is an int >= 0")
    if threshold is not None and not -math.inf <= threshold <= math.inf:
        raise ValueError(f"threshold={threshold}: accepted is a number")
    return Criteria(
        best=_best(n, topk, count),
        limit=None if limit is None else topk_blocks(limit, n),
        top_p=top_p,
        threshold=threshold,
        # floor(x) is written as -ceil(-x), because torch.compile does not support floor of a symbolic product.
        skip=-math.ceil(-skip * n - 1e-9) if skip else None,
        sink_blocks=sink_blocks,
        diagonal=diagonal,
    )


def _best(n: int, topk: float | None, count: int | None) -> int:
    if count is not None:
        return count
    return 1 if topk is None else topk_blocks(topk, n)


_kept_criteria = functools.lru_cache(maxsize=256)(_criteria)


def criteria_of(n: int, **options: Any) -> Criteria:
    """Return the criteria from the arguments of `SparsePlan.from_scores`, cached because layers and steps repeat them.

    Fractions are of `n` blocks. Raises the errors of `from_scores`.
    """
    if torch.compiler.is_compiling() or not isinstance(n, int):
        return _criteria(n, **options)
    return _kept_criteria(n, **options)


def topk_blocks(topk: float, n_k: int) -> int:
    """Return the number of blocks for the fraction `topk` of `n_k` blocks, at least one."""
    # Without the epsilon, ceil(.07 * 100) would be 8: the product is 7.000000000000001 in floating point.
    return max(1, math.ceil(topk * n_k - 1e-9))
