"""Triangle: A-shape in blocks in which the last queries read every key (TriangleMix, arXiv 2507.21526; Tri-shape)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel.config.base import check, count_of, is_int, is_share
from dit_accel.kernels import SparsePlan
from dit_accel.llm.prefill.pattern import Pattern, Prompt


@dataclass(frozen=True)
class Triangle(Pattern):
    """Pattern in which each query reads the first `sink` keys and the last `window` keys, both rounded up to whole blocks.

    The last `tail` queries of the call (a setting of all patterns) read every key.
    """

    name: ClassVar[str] = "triangle"
    sink: int = 64
    """Number of first keys."""
    window: int | float = 512
    """Number of last keys; a float is a share of the keys in (0, 1]."""

    def __post_init__(self) -> None:
        check("sink", self.sink, is_int(self.sink) and self.sink >= 0, "an int >= 0")
        ok = is_share(self.window) or (is_int(self.window) and self.window >= 1)
        check("window", self.window, ok, "an int >= 1, or a share of the keys in (0, 1]")

    def plan(self, prompt: Prompt) -> SparsePlan:
        first = torch.arange(prompt.num_q_blocks, device=prompt.q.device) * prompt.block
        # A chunk may start inside a key block, so the window counts from the first query of each query block.
        window = count_of(self.window, prompt.kv_len)
        begin = (first + prompt.offset - window + 1).clamp(min=0) // prompt.block
        keys = torch.arange(prompt.num_k_blocks, device=prompt.q.device)
        mask = (prompt.block_distance() >= 0) & (keys >= begin[:, None])
        mask[:, : -(-self.sink // prompt.block)] = True
        return self.from_blocks(prompt, mask[None, None])
