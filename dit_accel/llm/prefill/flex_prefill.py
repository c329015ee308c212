"""FlexPrefill: each head uses either estimated block scores or vertical-slash (arXiv 2502.20766)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.config.base import check, check_fraction, is_int, is_number
from dit_accel.kernels import SparsePlan, block_scores
from dit_accel.llm.prefill.estimate import last_query_sums
from dit_accel.llm.prefill.pattern import Pattern, Prompt
from dit_accel.llm.prefill.vertical_slash import best_bands, by_block, slash_blocks


@dataclass(frozen=True)
class FlexPrefill(Pattern):
    """Pattern that chooses between two patterns for each head.

    If the scores of block means predict the attention of the last queries of a head well, the head reads the blocks with the
    highest scores. Otherwise it reads the block columns and slashes that hold `gamma` of the attention of the last queries.
    """

    name: ClassVar[str] = "flex_prefill"
    gamma: float | int = 0.9
    """Cumulative attention to reach, in (0, 1]; 1 reads every key."""
    tau: float | int = 0.1
    """Threshold >= 0 of the Jensen-Shannon distance (square root of the divergence in nats) between predicted and actual
    attention. Heads below it use block scores."""
    min_budget: int = 512
    """Smallest number of keys for each query block, or for the columns and for the slashes of a head."""

    def __post_init__(self) -> None:
        check_fraction("gamma", self.gamma)
        check("tau", self.tau, is_number(self.tau) and self.tau >= 0, "a number >= 0")
        ok = is_int(self.min_budget) and self.min_budget >= 0
        check("min_budget", self.min_budget, ok, "an int >= 0")

    def plan(self, prompt: Prompt) -> SparsePlan:
        rest = (prompt.q_len - 1) % prompt.block + 1  # number of queries in the last block
        last = last_query_sums(prompt.q, prompt.k, scale=prompt.scale, last=rest)
        means = block_scores(
            prompt.q, prompt.k, block_q=prompt.block, block_k=prompt.block, scale=prompt.scale
        )
        attention = means.masked_fill(prompt.block_distance() < 0, -math.inf).softmax(-1)
        aware = self.query_aware(attention[:, :, -1], by_block(last.columns, prompt.block))
        mask = self.vertical_slash(prompt, last.columns, last.diagonals)
        # Sorting all blocks of a head is expensive, so only do it for the heads that need it.
        mask[aware] = self.blocks(prompt, attention[aware])
        return self.from_blocks(prompt, mask)

    def query_aware(
        self, guess: Float[Tensor, "b h n_k"], exact: Float[Tensor, "b h n_k"]
    ) -> Bool[Tensor, "b h"]:
        """Return the mask of heads whose predicted block attention `guess` is close to the exact one of the last queries."""
        middle = (guess + exact) / 2
        terms = torch.special.xlogy(guess, guess / middle) + torch.special.xlogy(
            exact, exact / middle
        )
        # 0 / 0 for blocks without any attention.
        divergence = terms.nan_to_num(0.0).sum(-1) / 2
        return divergence.clamp(min=0).sqrt() < self.tau

    def blocks(
        self, prompt: Prompt, attention: Float[Tensor, "n n_q n_k"]
    ) -> Bool[Tensor, "n n_q n_k"]:
        """Return the mask of the fewest blocks of each head whose attention, summed over all query blocks, reaches `gamma`."""
        least = -(-self.min_budget // prompt.block)
        some = attention.argsort(dim=-1, descending=True, stable=True).argsort(-1) < least
        if self.gamma == 1:
            return torch.ones_like(some)
        flat = attention.flatten(1) / max(1, attention.shape[1])
        ordered, order = flat.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < self.gamma
        return some | torch.zeros_like(kept).scatter_(-1, order, kept).view_as(some)

    def vertical_slash(
        self,
        prompt: Prompt,
        columns: Float[Tensor, "b h l_k"],
        diagonals: Float[Tensor, "b h l_k"],
    ) -> Bool[Tensor, "b h n_q n_k"]:
        """Return the mask of the block columns and slash blocks that hold `gamma` of the attention of the last queries."""
        chosen = []
        for sums in (columns, diagonals):
            ordered = sums.sort(-1, descending=True).values
            tokens = (ordered.cumsum(-1) < self.gamma).sum(-1, keepdim=True) + 1
            if self.gamma == 1:
                tokens = torch.full_like(tokens, prompt.kv_len)
            tokens = tokens.clamp(min=self.min_budget)
            chosen.append(best_bands(by_block(sums, prompt.block), -(-tokens // prompt.block)))
        return chosen[0][:, :, None] | slash_blocks(prompt, chosen[1])
