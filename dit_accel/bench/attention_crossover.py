"""Measurement of the lengths from which sparse attention is faster than dense attention (kernels/bench_attention.py)."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_accel.bench.attention_cases import DTYPES, Case, dense, inputs, make_plan
from dit_accel.bench.timing import Functions, seconds
from dit_accel.files import write_json
from dit_accel.kernels import sparse_linear_attention

CROSSOVER_LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
GPU_LENGTHS = (*CROSSOVER_LENGTHS, 16384, 32768, 65536, 131072)


def crossover_rows(device: str, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Return the crossover for each density and block size: the length from which sparse stays 1.25x faster than dense.

    The factor is a margin for noise in the measurements.
    """
    cpu = device == "cpu"
    rows = []
    heads, head_dim, blocks = (2, 64, (16, 32, 64, 128)) if cpu else (12, 128, (64, 128))
    grid = [(topk, block) for topk in (0.1, 0.25, 0.4) for block in blocks]
    for topk, block in tqdm(grid, desc="crossover"):
        first: int | None = None
        ratios = {}
        for length in CROSSOVER_LENGTHS if cpu else GPU_LENGTHS:
            if length < 4 * block:
                continue
            case = Case("crossover", heads, length, head_dim, block, block, topk)
            ratios[length] = crossover_ratio(case, device, dtype, repeats)
            first = (first or length) if ratios[length] > 1.25 else None
        rows.append(
            {
                "device": device.split(":")[0],
                "topk": topk,
                "block": block,
                "min_length": first,
                "threads": torch.get_num_threads(),
                "speedup_by_length": {str(n): round(x, 3) for n, x in ratios.items()},
            }
        )
    return rows


def crossover_ratio(case: Case, device: str, dtype: str, repeats: int) -> float:
    """Return the speed-up of sparse attention, routing and planning included, over the default backend of SDPA."""
    # Memory layout of a transformer: [B, L, H, D].
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(case, device, DTYPES[dtype])
    )
    both: Functions = {
        "dense": lambda: dense(q, k, v),
        "sparse": lambda: sparse_linear_attention(q, k, v, make_plan(case, q, k)),
    }
    repeats = max(repeats, 9 if case.length < 2048 else 3)
    found = seconds(both, repeats, device, wall=True)
    return statistics.median(found["dense"]) / statistics.median(found["sparse"])


def write_crossover(rows: list[dict[str, Any]]) -> None:
    """Print the rows, and store them in the table of crossover="auto", in place of the rows of this device."""
    for row in rows:
        wins = f"from {row['min_length']} tokens" if row["min_length"] else "nowhere"
        ratios = "  ".join(f"{n}: {x:.2f}x" for n, x in row["speedup_by_length"].items())
        print(f"topk {row['topk']} block {row['block']}: sparse is faster {wins}  ({ratios})")
    table = Path(__file__).parents[1] / "sla" / "crossover.json"
    kept = [
        row for row in json.loads(table.read_text())["rows"] if row["device"] != rows[0]["device"]
    ]
    write_json(table, {"format_version": 1, "rows": kept + rows})
