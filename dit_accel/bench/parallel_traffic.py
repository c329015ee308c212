"""Benchmark of the traffic between processes under context parallelism (pipelines/bench_parallel.py)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import dit_accel
from dit_accel.bench.collectives import Collectives
from dit_accel.bench.record import write_record

METHODS: dict[str, dict[str, Any]] = {
    "diffusers, dense": {},
    "dit_accel, dense": {"ras": {"ratio": 1.0, "warmup": 1, "tail": 1, "resets": ()}},
    "sla balanced": {"sla": {"crossover": "never", "dense_steps": 0, "dense_layers": 0}},
    "ras half": {"ras": {"ratio": 0.5, "warmup": 2, "tail": 1, "resets": ()}},
    "ras and sla": {
        "ras": {"ratio": 0.25, "warmup": 2, "tail": 1, "resets": ()},
        "sla": {"crossover": "never", "dense_steps": 0, "dense_layers": 0},
    },
    "ras forecast": {"ras": {"budget": 0.6, "warmup": 2, "tail": 1}},
}


@dataclass
class ParallelTraffic:
    """Traffic of each step of a sampling loop under context parallelism, on a Wan2.1-1.3B with few layers."""

    output: Path | None = None
    """Results file. Default: print only."""
    table: Path | None = None
    """Results file to print as the table of docs/parallel.md, without a measurement."""
    layers: int = 2
    """Number of layers. The traffic of a layer does not depend on it."""
    frames: int = 2
    """Number of latent frames of 60 x 104."""

    def run(self) -> None:
        """Measure all rows, print them, and write them to `output`; or print the table of a results file."""
        if self.table is not None:
            print(table(json.loads(self.table.read_text())["rows"]))
            return
        dist.init_process_group("gloo")
        rows = []
        for name, methods in METHODS.items():
            row = self.measured(name, methods)
            rows.append(row)
            if dist.get_rank() == 0:
                print(name)
                for key in ("active_tokens", "all_to_all_per_layer", "collectives"):
                    print(f"  {key}: {row[key]}")
                shares = [
                    round(a / b, 4) if b else a
                    for a, b in zip(
                        row["bytes_per_layer"], row["formula_bytes_per_layer"], strict=True
                    )
                ]
                print(
                    f"  bytes over the formula 4 x tokens x width / processes x others' share: {shares}"
                )
        if self.output is not None and dist.get_rank() == 0:
            write_record(self.output, 1, self, rows)
        dist.destroy_process_group()

    def measured(self, name: str, methods: dict[str, Any]) -> dict[str, Any]:
        """Run a sampling loop of six steps, and return the traffic of each step."""
        torch.manual_seed(0)
        transformer: Any = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=self.layers
        )
        latents = torch.randn(1, 16, self.frames, 60, 104)
        text = torch.randn(1, 512, 4096)
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(6)
        if methods:
            dit_accel.enable(transformer, **methods)
        size = dist.get_world_size()
        dit_accel.enable_parallelism(transformer, config=ContextParallelConfig(ulysses_degree=size))
        steps = []
        with torch.no_grad(), dit_accel.sampling_loop(transformer, scheduler):
            for t in scheduler.timesteps:
                with Collectives(size) as sent:
                    velocity = transformer(latents, t.expand(1), text, return_dict=False)[0]
                steps.append({"calls": dict(sent.calls), "bytes": dict(sent.nbytes)})
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        tokens = self.frames * 30 * 52
        active = [tokens] * 6
        if "ras" in methods:
            rows = dit_accel.summary(transformer).methods["ras"].steps
            active = [0 if x.mode == "forecast" else x.active for x in rows]
        exchanged = [x["bytes"].get("all_to_all_single", 0) / self.layers for x in steps]
        # q, k, v and o have tokens x width / processes numbers each. A process keeps its own share.
        formula = [4 * n * 1536 * 4 / size * (size - 1) / size for n in active]
        return {
            "method": name,
            "active_tokens": active,
            "all_to_all_per_layer": [
                x["calls"].get("all_to_all_single", 0) / self.layers for x in steps
            ],
            "collectives": [sum(x["calls"].values()) for x in steps],
            "bytes_per_layer": exchanged,
            "formula_bytes_per_layer": formula,
            "other_bytes": [
                sum(n for k, n in x["bytes"].items() if k != "all_to_all_single") for x in steps
            ],
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/parallel.md as Markdown."""
    lines = [
        "| | tokens that run | all-to-all a layer | collectives a call | MB sent a layer | formula |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for at in (0, 1, 3):  # the first step, a dense step, and one in the middle
            if at and all(row[k][at] == row[k][0] for k in row if k != "method"):
                continue
            cells = [
                row["method"] + (", first call" if at == 0 else f", step {at}"),
                str(row["active_tokens"][at]),
                f"{row['all_to_all_per_layer'][at]:.0f}",
                str(row["collectives"][at]),
                *(
                    f"{row[k][at] / 1e6:.2f}"
                    for k in ("bytes_per_layer", "formula_bytes_per_layer")
                ),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
