"""Benchmark of attention with a sliding window on one layer (kernels/bench_window.py)."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.bench.timing import seconds
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.kernels import block_sparse_attention
from dit_accel.llm.dense import dense_attention
from dit_accel.llm.window import window_plan


@dataclass
class WindowSpeed:
    """Seconds of one attention layer with a sliding window, by implementation."""

    output: Path
    """Results file."""
    cases: tuple[tuple[int, int], ...] = ((1024, 512), (4096, 512), (4096, 2048), (8192, 1024), (8192, 4096))  # fmt: skip
    """Pairs (number of tokens, window)."""
    dtype: str = "float32"
    repeats: int = 3
    device: str = "cpu"

    @torch.no_grad()
    def run(self) -> None:
        """Measure, print the rows, and write them to `output`."""
        torch.set_num_threads(1)
        rows = []
        for length, window in self.cases:
            found = seconds(self._functions(length, window), self.repeats, self.device)
            row: dict[str, Any] = {"length": length, "window": window}
            rows.append(row | {name: statistics.median(times) for name, times in found.items()})
            print(rows[-1], flush=True)
        record = {"format_version": 1, "dtype": self.dtype, "rows": rows}
        write_json(self.output, record | {"versions": versions(), "machine": machine()})

    def _functions(self, length: int, window: int) -> dict[str, Any]:
        """Return the implementations by name; "causal" has no window."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, h, length, 64, generator=generator).to(
                self.device, getattr(torch, self.dtype)
            )
            for h in (4, 2, 2)
        )
        at = torch.arange(length, device=self.device)
        distance = at[:, None] - at
        pairs = (distance >= 0) & (distance < window)
        return {
            "mask of pairs": lambda: scaled_dot_product_attention(
                q, k, v, attn_mask=pairs, enable_gqa=True
            ),
            "chunks": lambda: dense_attention(q, k, v, scale=0.125, window=window),
            "plan": lambda: block_sparse_attention(
                q, k, v, window_plan(length, length, window=window, block=64, device=self.device)
            ),
            "causal": lambda: dense_attention(q, k, v, scale=0.125),
        }
