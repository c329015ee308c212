"""A-shape: the first keys and a sliding window, the same for all heads (StreamingLLM, arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel.config.base import check, is_int
from dit_accel.kernels import SparsePlan
from dit_accel.llm.prefill.pattern import Pattern, Prompt


@dataclass(frozen=True)
class AShape(Pattern):
    """Pattern in which each query reads the first `sink` keys and the last `window` keys up to its own position.

    The query at position i reads key j <= i exactly if j < sink or i - j < window. The last queries of a call are treated
    like all others, so a prompt in chunks gives the same result as in one call.
    """

    name: ClassVar[str] = "a_shape"
    joins: ClassVar[bool] = False
    sink: int = 64
    """Number of first keys."""
    window: int = 1024
    """Number of last keys, including the query's own position."""

    def __post_init__(self) -> None:
        check("sink", self.sink, is_int(self.sink) and self.sink >= 0, "an int >= 0")
        check("window", self.window, is_int(self.window) and self.window >= 1, "an int >= 1")

    def plan(self, prompt: Prompt) -> SparsePlan:
        shape = 1, 1, prompt.num_q_blocks, prompt.num_k_blocks
        every = torch.ones(shape, dtype=torch.bool, device=prompt.q.device)
        return SparsePlan.from_block_mask(every, **prompt.rules, window=self.window, sink=self.sink)
