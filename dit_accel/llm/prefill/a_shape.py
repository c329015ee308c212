"""A-shape: the first keys and a window (StreamingLLM, arXiv 2309.17453), one pattern for all heads."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel.config.base import check, is_int
from dit_accel.kernels import SparsePlan
from dit_accel.llm.prefill.pattern import Pattern, Prompt


@dataclass(frozen=True)
class AShape(Pattern):
    """Each query reads the first `sink` keys and the last `window` up to its own.

    The mask is exact: key j is read by the query at position i if j < sink or i - j < window. The last queries of a
    call are not special, so chunks of a prompt give what one call gives.
    """

    name: ClassVar[str] = "a_shape"
    joins: ClassVar[bool] = False
    sink: int = 64
    """First keys."""
    window: int = 1024
    """Last keys, the query's own position among them."""

    def __post_init__(self) -> None:
        check("sink", self.sink, is_int(self.sink) and self.sink >= 0, "an int >= 0")
        check("window", self.window, is_int(self.window) and self.window >= 1, "an int >= 1")

    def plan(self, prompt: Prompt) -> SparsePlan:
        shape = 1, 1, prompt.num_q_blocks, prompt.num_k_blocks
        every = torch.ones(shape, dtype=torch.bool, device=prompt.q.device)
        return SparsePlan.from_block_mask(every, **prompt.rules, window=self.window, sink=self.sink)
