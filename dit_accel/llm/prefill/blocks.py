"""Blocks by score: the best key blocks of each query block, as a cheap router ranks them."""

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.config.base import check, check_fraction, is_int
from dit_accel.kernels import SparsePlan, block_scores
from dit_accel.llm.prefill.pattern import Pattern, Prompt


@dataclass(frozen=True)
class Blocks(Pattern):
    """Scores of block means, with the "spread" correction for keys that differ (see `block_scores`), or without it
    (block-sparse of MInference, arXiv 2407.02490).

    With `top_p` each row keeps the fewest best blocks whose estimated mass reaches it; with `topk` a fixed share.
    """

    name: ClassVar[str] = "blocks"
    top_p: float | int | None = 0.9
    """Estimated softmax mass in (0, 1]; None: `topk` alone decides."""
    topk: float | int | None = None
    """Share of the key blocks in (0, 1]; with `top_p` the union of both."""
    count: int | None = None
    """Number of key blocks of each row, in place of `topk`."""
    spread: bool = True

    def __post_init__(self) -> None:
        if self.top_p is None and self.topk is None and self.count is None:
            raise ValueError(
                "top_p=None, topk=None: accepted is a fraction in (0, 1] for one of them"
            )
        if self.count is not None:
            check("count", self.count, is_int(self.count) and self.count >= 1, "an int >= 1")
            check("topk", self.topk, self.topk is None, "None where count is given")
        for name in ("top_p", "topk"):
            if (value := getattr(self, name)) is not None:
                check_fraction(name, value)

    def plan(self, prompt: Prompt) -> SparsePlan:
        scores = block_scores(
            prompt.q,
            prompt.k,
            block_q=prompt.block,
            block_k=prompt.block,
            scale=prompt.scale,
            spread=self.spread,
        )
        kept = SparsePlan.from_scores(
            scores,
            top_p=self.top_p,
            topk=self.topk,
            count=None if self.count is None else min(self.count, prompt.num_k_blocks),
            geometry=prompt.geometry,
        )
        return self.from_blocks(prompt, kept.to_block_mask())
