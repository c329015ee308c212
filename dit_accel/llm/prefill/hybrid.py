"""Hybrid: blocks by estimated attention plus single keys. This is the default pattern."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.config.base import check, check_choice, check_fraction, count_of, is_int, is_share
from dit_accel.kernels import SparsePlan, block_scores
from dit_accel.llm.prefill.estimate import column_sums, spread_rows, top_columns
from dit_accel.llm.prefill.pattern import Pattern, Prompt
from dit_accel.llm.prefill.xattention import STRIDES, antidiagonal_mass, blocks_of_mass

QUERIES = 64
"""Number of queries whose attention ranks the single keys."""


@dataclass(frozen=True)
class Hybrid(Pattern):
    """Pattern that combines key blocks with single keys (columns).

    Each query block reads the fewest key blocks whose estimated attention reaches `top_p`. In addition, each head reads the
    single keys with the most attention outside of these blocks, because some heads attend to scattered keys that blocks
    cannot cover cheaply.
    """

    name: ClassVar[str] = "hybrid"
    top_p: float | int = 0.9
    """Estimated softmax mass of the blocks in (0, 1]; 1 reads every key."""
    columns: int | float = 128
    """Maximum number of single keys per head; a float is a share of the keys in (0, 1]."""
    scores: str = "xattention"
    """Estimate of the block scores: "xattention" (sums of antidiagonals), or "spread" (corrected block means, see
    `block_scores`), which is faster and less accurate."""
    stride: int = 8
    """Stride of the antidiagonals: 8 or 16."""
    queries: str = "spread"
    """Queries that rank the single keys: "spread" evenly over the prompt, or the "last" queries."""
    per_group: bool = False
    """Use the same blocks and keys for all query heads that share keys: slightly less accurate, but faster on a CPU."""

    def __post_init__(self) -> None:
        check_fraction("top_p", self.top_p)
        ok = is_share(self.columns) or (is_int(self.columns) and self.columns >= 0)
        check("columns", self.columns, ok, "an int >= 0, or a share of the keys in (0, 1]")
        check_choice("scores", self.scores, ("xattention", "spread"))
        check_choice("stride", self.stride, STRIDES)
        check_choice("queries", self.queries, ("spread", "last"))
        check("per_group", self.per_group, isinstance(self.per_group, bool), "True or False")

    def plan(self, prompt: Prompt) -> SparsePlan:
        mask = blocks_of_mass(prompt, self.block_logits(prompt), self.top_p)
        if self.columns == 0:
            return self.from_blocks(prompt, mask)
        worth = self.column_worth(prompt, mask | prompt.near())
        return self.from_blocks(
            prompt, mask, top_columns(worth, count_of(self.columns, prompt.kv_len))
        )

    def block_logits(self, prompt: Prompt) -> Float[Tensor, "b h n_q n_k"]:
        """Return the logarithm of the estimated attention of each block, per head or per group."""
        block, scale = prompt.block, prompt.scale
        if self.scores == "xattention":
            mass = antidiagonal_mass(
                prompt.q, prompt.k, block=block, stride=self.stride, scale=scale
            )
            return self._joined(prompt, mass).log()
        logits = block_scores(
            prompt.q, prompt.k, block_q=block, block_k=block, scale=scale, spread=True
        )
        if not self.per_group:
            return logits
        hidden = prompt.block_distance() < 0
        mass = logits.masked_fill(hidden, -float("inf")).softmax(-1)
        return self._joined(prompt, mass).log()

    def column_worth(
        self, prompt: Prompt, read: Bool[Tensor, "b h n_q n_k"]
    ) -> Float[Tensor, "b h l_k"]:
        """Return the attention to each key outside of the blocks `read`, per head or per group."""
        # The last queries read every key, so only the other queries need single keys.
        others = max(0, prompt.q_len - prompt.tail)
        rows = spread_rows(others, QUERIES)
        if self.queries == "last":
            rows = range(max(0, prompt.q_len - QUERIES), prompt.q_len)
        worth = column_sums(
            prompt.q, prompt.k, rows, scale=prompt.scale, read=read, block=prompt.block
        )
        return self._joined(prompt, worth)

    def _joined(self, prompt: Prompt, x: Tensor) -> Tensor:
        """Return the mean over the query heads of each group with `per_group`; otherwise the input."""
        return x.unflatten(1, (prompt.k.shape[1], -1)).mean(2) if self.per_group else x
