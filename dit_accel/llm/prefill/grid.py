"""Grid: keys at a regular stride, for heads that attend to the same place in each video frame (MMInference, arXiv
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
"""Number of last queries whose attention determines the place of the grid in a frame."""


@dataclass(frozen=True)
class Grid(Pattern):
    """Pattern in which each query reads the first `sink` keys, the last `window` keys, and the keys `phase + n * stride`.

    If the video frames of a prompt are known, the grid keys of a head are at one place of every frame. The last `tail`
    queries read every key. With `rows`, the queries at the positions of the grid keys also read every key.
    """

    name: ClassVar[str] = "grid"
    stride: int | None = None
    """Distance between grid keys, such as the number of tokens per video frame. None: use the video frames of the prompt, or
    without them detect a stride for each head from the attention of the last queries."""
    phase: int = 0
    """Position of the first grid key; only used with `stride`."""
    sink: int = 64
    """Number of first keys."""
    window: int = 1024
    """Number of last keys, including the query's own position."""
    rows: bool = False
    """Let queries at the positions of grid keys read every key; needs `stride`."""
    min_gain: float | int = 0.05
    """Attention in [0, 1] by which a grid must exceed the same number of average keys. Heads without such a grid read only the
    sink and the window."""

    def __post_init__(self) -> None:
        stride, phase = self.stride, self.phase
        ok = stride is None or (is_int(stride) and stride >= 2)
        check("stride", stride, ok, "an int >= 2 or None")
        ok = is_int(phase) and 0 <= phase < (1 if stride is None else stride)
        check("phase", phase, ok, "an int from 0 to stride - 1, or 0 without a stride")
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
        """Return the grid keys of each head, or one set for all heads."""
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
        """Return the keys of the grids detected in the batch rows `rows`."""
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
        """Return the keys at the best place of every video frame in one batch row."""
        q, k = prompt.q[row : row + 1], prompt.k[row : row + 1]
        sums = last_query_sums(q, k, scale=prompt.scale, last=LAST).columns[0]
        stop = prompt.kv_len - min(LAST, prompt.q_len) - self.window + 1
        return frame_columns(sums, frames, first=self.sink, stop=stop, min_gain=self.min_gain)[None]

    def band(self, prompt: Prompt, order: Int[Tensor, " l_q"]) -> Bool[Tensor, "n_q n_k"]:
        """Return the mask of blocks with sink or window keys of a query, for queries in the given order.

        The first block, the block of the query and the block before it are always included.
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
        """Return a plan that reorders queries so that those that read every key come last, in separate blocks."""
        assert self.stride is not None
        at = torch.arange(prompt.q_len, device=prompt.q.device)
        dense = (at + prompt.offset) % self.stride == self.phase
        dense = dense | (at >= prompt.q_len - prompt.tail)
        order = dense.int().argsort(stable=True)
        others = int((~dense).sum())
        # A block with both kinds of queries reads every key.
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
