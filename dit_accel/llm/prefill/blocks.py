"""Blocks: the key blocks with the highest estimated scores for each query block."""

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.config.base import check, check_fraction, is_int
from dit_accel.kernels import SparsePlan, block_scores
from dit_accel.llm.prefill.pattern import Pattern, Prompt


@dataclass(frozen=True)
class Blocks(Pattern):
    """Pattern that ranks key blocks by the scores of block means, with or without the "spread" correction for varying keys
    (see `block_scores`). Without it this is the block-sparse pattern of MInference (arXiv 2407.02490).

    With `top_p`, each query block reads the fewest key blocks whose estimated softmax mass reaches `top_p`. With `topk` or
    `count`, it reads a fixed share or number of key blocks.
    """

    name: ClassVar[str] = "blocks"
    top_p: float | int | None = 0.9
    """Estimated softmax mass in (0, 1]; None: use only `topk` or `count`."""
    topk: float | int | None = None
    """Share of the key blocks in (0, 1]. Together with `top_p`, the union of both is read."""
    count: int | None = None
    """Number of key blocks per query block, instead of `topk`."""
    spread: bool = True
    """Use the "spread" correction in the scores."""

    def __post_init__(self) -> None:
        if self.top_p is None and self.topk is None and self.count is None:
            raise ValueError("top_p=None, topk=None, count=None: at least one must be given")
        if self.count is not None:
            check("count", self.count, is_int(self.count) and self.count >= 1, "an int >= 1")
            check("topk", self.topk, self.topk is None, "None if count is given")
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
