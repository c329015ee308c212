"""Benchmark of sparse prefill of one attention layer against dense attention (kernels/bench_prefill.py)."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit_accel.bench.timing import seconds
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.llm.prefill import Prompt, pattern_of

FORMAT_VERSION = 1
GEOMETRIES = {"smollm2-135m": (9, 3, 64), "llama-3.1-8b, a quarter of the heads": (8, 2, 128)}
"""Number of query heads, number of key heads, and head_dim, by name."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class PrefillSpeed:
    """Seconds of one attention layer that reads a prompt: dense attention, static patterns, and plans of a given density."""

    output: Path
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    geometry: Literal["smollm2-135m", "llama-3.1-8b, a quarter of the heads"] = "smollm2-135m"
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    densities: tuple[float, ...] = (0.1, 0.25)
    block: int = 64
    repeats: int = 5
    threads: int = 1
    device: str = "cpu"

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        rows: list[dict[str, Any]] = []
        cases = [(length, dtype) for dtype in self.dtypes for length in self.lengths]
        for length, dtype in tqdm(cases, desc=self.geometry):
            rows += self._measure(length, dtype)
        record: dict[str, Any] = {"format_version": FORMAT_VERSION, "rows": rows}
        record |= {"geometry": self.geometry, "threads": self.threads}
        record |= {"versions": versions(), "machine": machine()}
        write_json(self.output, record)
        print_table(record)

    @torch.no_grad()
    def _measure(self, length: int, dtype: str) -> list[dict[str, Any]]:
        heads, kv_heads, head_dim = GEOMETRIES[self.geometry]
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, h, length, head_dim, generator=generator).to(self.device, DTYPES[dtype])
            for h in (heads, kv_heads, kv_heads)
        )
        prompt = Prompt(q, k, scale=head_dim**-0.5, block=self.block)
        plans: dict[str, SparsePlan] = {}
        for density in self.densities:
            plans[f"one pattern a group, {density}"] = self._random(prompt, density, kv_heads)
            plans[f"one pattern a head, {density}"] = self._random(prompt, density, heads)
        for name in ("a_shape", "triangle"):
            # A window of w of n keys holds 1 - (1 - w / n)^2 of the pairs.
            for density in self.densities:
                window = max(self.block, round((1 - (1 - density) ** 0.5) * length))
                pattern = pattern_of(name, {"window": window})
                plans[f"{name}, {density}"] = pattern.plan(prompt)
        estimators = {
            "scores and plan, spread": lambda: pattern_of("blocks").plan(prompt),
        }
        every = self._random(prompt, 1.0, 1)
        functions: dict[str, Any] = {
            "dense": lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            "every block": lambda: block_sparse_attention(q, k, v, every),
        }
        for name, plan in plans.items():
            functions[name] = lambda plan=plan: block_sparse_attention(q, k, v, plan)
        functions |= estimators
        found = seconds(functions, self.repeats, self.device)
        dense = statistics.median(found["dense"])
        whole = statistics.median(found["every block"])
        rows = []
        for name, times in found.items():
            measured = plans.get(name)
            took = statistics.median(times)
            read = None if measured is None else measured.density()
            row = {
                "length": length,
                "dtype": dtype,
                "kind": name,
                "seconds": took,
                "density": read,
                "over_dense": took / dense,
                "share_of_ideal": None if read is None else read * whole / took,
            }
            rows.append(row)
        return rows

    def _random(self, prompt: Prompt, density: float, heads: int) -> SparsePlan:
        """Return a plan that reads a random share `density` of the visible blocks of each row."""
        visible = prompt.block_distance() >= 0
        generator = torch.Generator().manual_seed(0)
        draw = torch.rand(1, heads, *visible.shape, generator=generator).to(visible.device)
        rank = draw.masked_fill(~visible, -1.0).argsort(-1, descending=True).argsort(-1)
        mask = (rank < (visible.sum(1) * density).ceil()[:, None]) & visible
        return SparsePlan.from_block_mask(mask, **prompt.rules)


def print_table(record: dict[str, Any]) -> None:
    """Print a table for each dtype: speed-up over dense attention by plan and length."""
    rows = record["rows"]
    for dtype in dict.fromkeys(x["dtype"] for x in rows):
        lengths = sorted({x["length"] for x in rows if x["dtype"] == dtype})
        print(f"\n{record['geometry']}, {dtype}, {record['threads']} thread(s), dense over this\n")
        print(f"| | {' | '.join(f'{n}' for n in lengths)} |\n|{'---|' * (len(lengths) + 1)}")
        for kind in dict.fromkeys(x["kind"] for x in rows):
            cells = []
            for n in lengths:
                x = next(
                    x for x in rows if (x["dtype"], x["length"], x["kind"]) == (dtype, n, kind)
                )
                shown = f"{1 / x['over_dense']:.2f}x"
                cells.append(shown if x["density"] is None else f"{shown} ({x['density']:.2f})")
            print(f"| {kind} | {' | '.join(cells)} |")
        shares = [
            x["share_of_ideal"]
            for x in rows
            if x["dtype"] == dtype and x["share_of_ideal"] is not None
        ]
        print(
            f"\nof the speed that the density would give beside every block: {min(shares):.0%} to {max(shares):.0%}"
        )
