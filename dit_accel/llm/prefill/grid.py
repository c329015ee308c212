"""Grid: every stride-th key, for heads that look at the same place of each video frame (MMInference, arXiv
2504.16083)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.config.base import check, is_int, is_number
from dit_accel.kernels import SparsePlan
from dit_accel.llm.prefill.estimate import last_query_sums
from dit_accel.llm.prefill.grid_detection import Grids, detect, grid_columns
from dit_accel.llm.prefill.grid_frames import frame_columns, frame_starts
from dit_accel.llm.prefill.pattern import Pattern, Prompt

__all__ = ["Grid", "detect"]

LAST = 64
"""Last queries whose attention tells the place of the grid in a frame."""


@dataclass(frozen=True)
class Grid(Pattern):
    """Each query reads the first `sink` keys, the last `window`, and every key at `phase` plus a multiple of `stride`.

    Where the frames of a prompt's videos are known, the keys of a head lie at one place of every frame. The last `tail` queries read every key. With `rows` the queries at the positions of these keys do so too.
    """

    name: ClassVar[str] = "grid"
    stride: int | None = None
    """Tokens from one key to the next, such as those of a video frame; None: the frames of the prompt's videos, or
    without them found for each head from the attention of the last queries."""
    phase: int = 0
    """Position of the first of these keys; has a meaning with `stride` only."""
    sink: int = 64
    window: int = 1024
    rows: bool = False
    """Whether queries at the positions of these keys read every key; needs `stride`."""
    min_gain: float | int = 0.05
    """Attention in [0, 1] that a grid must hold in excess of as many average keys; heads without one read the sink and
    the window."""

    def __post_init__(self) -> None:
        stride, phase = self.stride, self.phase
        ok = stride is None or (is_int(stride) and stride >= 2)
        check("stride", stride, ok, "an int >= 2 or None")
        ok = is_int(phase) and 0 <= phase < (1 if stride is None else stride)
        check("phase", phase, ok, "an int from 0 to stride - 1; without a stride 0")
        check("sink", self.sink, is_int(self.sink) and self.sink >= 0, "an int >= 0")
        check("window", self.window, is_int(self.window) and self.window >= 1, "an int >= 1")
        check("rows", self.rows, isinstance(self.rows, bool), "True or False")
        check("rows", self.rows, not self.rows or stride is not None, "False without a stride")
        ok = is_number(self.min_gain) and 0 <= self.min_gain <= 1
        check("min_gain", self.min_gain, ok, "a number in [0, 1]")

    @property
    def reads_spans(self) -> bool:
        return self.stride is None

    def plan(self, prompt: Prompt) -> SparsePlan:
        columns = self.columns(prompt)
        if self.rows:
            return self._with_rows(prompt, columns)
        at = torch.arange(prompt.q_len, device=prompt.q.device)
        return self.from_blocks(prompt, self.band(prompt, at)[None, None], columns)

    def columns(self, prompt: Prompt) -> Int[Tensor, "b h n"]:
        """Return the keys of the grid of each head, or of all heads."""
        if self.stride is not None:
            one = torch.ones(1, 1, dtype=torch.long, device=prompt.q.device)
            given = Grids(one * self.stride, one * self.phase, one.float())
            return grid_columns(given, prompt.kv_len)
        rows = [frame_starts(spans) for spans in prompt.spans or ()]
        if not any(rows):
            return self._detected(prompt, slice(None))
        found = [
            self._of_frames(prompt, b, frames)
            if frames
            else self._detected(prompt, slice(b, b + 1))
            for b, frames in enumerate(rows)
        ]
        longest = max(x.shape[-1] for x in found)
        padded = [pad(x, (0, longest - x.shape[-1]), value=prompt.kv_len) for x in found]
        return torch.cat(padded)

    def _detected(self, prompt: Prompt, rows: slice) -> Int[Tensor, "b h n"]:
        """The keys of a grid that is found in some rows."""
        found = detect(
            prompt.q[rows],
            prompt.k[rows],
            scale=prompt.scale,
            sink=self.sink,
            window=self.window,
            min_gain=self.min_gain,
        )
        return grid_columns(found, prompt.kv_len)

    def _of_frames(
        self, prompt: Prompt, row: int, frames: dict[int, list[int]]
    ) -> Int[Tensor, "1 h n"]:
        """The keys at one place of every frame of a row's videos."""
        q, k = prompt.q[row : row + 1], prompt.k[row : row + 1]
        sums = last_query_sums(q, k, scale=prompt.scale, last=LAST).columns[0]
        stop = prompt.kv_len - min(LAST, prompt.q_len) - self.window + 1
        return frame_columns(sums, frames, first=self.sink, stop=stop, min_gain=self.min_gain)[None]

    def band(self, prompt: Prompt, order: Int[Tensor, " l_q"]) -> Bool[Tensor, "n_q n_k"]:
        """Return the blocks that hold sink or window of a query, for query blocks in this order.

        The first block, that of the query and the one before are read in any case.
        """
        block, device = prompt.block, order.device
        filled = torch.cat([order, order[-1:].expand(-len(order) % block)])
        at = filled.unflatten(0, (-1, block)) + prompt.offset
        first, last = at.amin(1, keepdim=True), at.amax(1, keepdim=True)
        first = torch.minimum(first - self.window + 1, (first // block - 1) * block)
        key = torch.arange(prompt.num_k_blocks, device=device) * block
        near = (key + block > first) & (key <= last)
        return near | (key < max(self.sink, 1))

    def _with_rows(self, prompt: Prompt, columns: Tensor) -> SparsePlan:
        """A plan in which the queries that read every key come last, in blocks of their own."""
        assert self.stride is not None
        at = torch.arange(prompt.q_len, device=prompt.q.device)
        dense = (at + prompt.offset) % self.stride == self.phase
        dense = dense | (at >= prompt.q_len - prompt.tail)
        order = dense.int().argsort(stable=True)
        others = int((~dense).sum())
        # A block that holds queries of either kind reads every key.
        start = prompt.num_q_blocks if others == prompt.q_len else others // prompt.block
        mask = self.band(prompt, order)
        mask[start:] = True
        return SparsePlan.from_block_mask(
            mask[None, None],
            **prompt.rules,
            columns=columns,
            q_order=order[None],
            long_rows=torch.arange(start, prompt.num_q_blocks, device=prompt.q.device),
        )
