"""Benchmark of time and memory of a training step, dense and sparse (finetune/bench_training.py)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel import control
from dit_accel.bench.geometries import wan
from dit_accel.bench.timing import Functions, Timed, seconds, summary, undisturbed
from dit_accel.bench.training_kinds import PARTS, Pass, passes, settings, variant
from dit_accel.bench.training_memory import attention_operators, peak_bytes, saved_bytes
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 1
TIME_BOUND = 0.75
"""Largest time of a sparse step, as a share of a dense step, for the transformer and for a block."""
MEMORY_BOUND = 1.2
"""Largest memory of a sparse step, as a share of a dense step, for the transformer and for a block."""
GRIDS = {"cpu": (8, 32, 32), "cuda": (21, 30, 52)}
"""Latent tokens by device: 8,192, and those of 81 frames at 480p."""
LAYERS = {"cpu": 1, "cuda": 30}
Row = dict[str, Any]


@dataclass
class TrainingStep:
    """Forward and backward pass of a Wan transformer with random weights, dense and sparse in turns."""

    output: Path | None = None
    device: str = "cpu"
    heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 8960
    text_dim: int = 4096
    layers: int | None = None
    """Number of layers. Default: 1 on a CPU, 30 (Wan2.1 1.3B) on a GPU."""
    grid: tuple[int, int, int] | None = None
    """Latent tokens: frames, rows, columns. Default: 8 32 32 on a CPU, 21 30 52 (81 frames at 480p) on a GPU."""
    topk: float = 0.1
    block: int = 64
    kinds: tuple[str, ...] = tuple(settings(0.1, 64))
    """Kinds to measure, including "dense"."""
    parts: tuple[str, ...] = PARTS
    repeats: int = 5
    """Number of timed steps of each kind, in turns, after one warm-up step. On a CPU, steps count only if other processes
    used at most a tenth of a core."""
    most_rounds: int = 15
    """On a CPU: largest number of rounds. If a kind then has too few undisturbed steps, all of its steps count."""
    bf16: bool | None = None
    """Compute in bf16 with fp32 weights. Default: on a GPU."""
    gradient_checkpointing: bool | None = None
    """Use gradient checkpointing. Default: on a GPU, where a 480p clip does not fit without it."""

    def __post_init__(self) -> None:
        place = torch.device(self.device).type
        self.layers = LAYERS[place] if self.layers is None else self.layers
        self.grid = GRIDS[place] if self.grid is None else self.grid
        self.bf16 = place == "cuda" if self.bf16 is None else self.bf16
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = place == "cuda"
        for name, given, known in (
            ("kinds", self.kinds, settings(self.topk, self.block)),
            ("parts", self.parts, PARTS),
        ):
            unknown = [x for x in given if x not in known]
            if unknown or not given:
                raise ValueError(f"{name}={given}: accepted are {', '.join(known)}")
        if "dense" not in self.kinds:
            raise ValueError(f'kinds={self.kinds}: accepted are kinds that include "dense"')

    def run(self) -> dict[str, Any]:
        """Measure, print a table, write the record to `output`, and return it."""
        kinds = self._passes()
        options = {name: x for name, x in asdict(self).items() if name != "output"}
        record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "options": options,
            "real_width": (self.heads, self.head_dim, self.ffn_dim) == (12, 128, 8960),
            "dense_operators": attention_operators(kinds["dense"]["transformer"]),
            "bounds": {"time": TIME_BOUND, "memory": MEMORY_BOUND},
            "rows": [],
            "versions": versions(),
            "machine": machine(),
        }
        for part in self.parts:
            record["rows"] += self.measure(part, {name: x[part] for name, x in kinds.items()})
            record["misses"] = misses(record["rows"])
            if self.output is not None:  # written after each part, because a run takes half an hour
                self.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.output, record)
        print("\n".join(table(record["rows"])))
        for text in record["misses"]:
            print(f"misses its bound: {text}")
        return record

    def _passes(self) -> dict[str, dict[str, Pass]]:
        """Return forward passes by kind and part. All kinds share their weights."""
        assert self.grid is not None
        assert self.layers is not None
        torch.manual_seed(0)
        device = torch.device(self.device)
        dim = self.heads * self.head_dim
        build, inputs = wan(
            dim, self.layers, self.heads, self.ffn_dim, self.grid, text=self.text_dim
        )
        with device:
            transformer = build().train()
        if self.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        call = inputs(device, torch.float32) | {
            "timestep": torch.full((1,), 500.0, device=device),
            "return_dict": False,
        }
        return {
            name: passes(
                variant(transformer, settings(self.topk, self.block)[name]),
                call,
                autocast=bool(self.bf16),
            )
            for name in self.kinds
        }

    def measure(self, part: str, kinds: dict[str, Pass]) -> list[Row]:
        """Return a row for each kind.

        Args:
            part: name of the part.
            kinds: forward passes of the part, by kind.
        """
        print(f"{part}: {', '.join(kinds)}", flush=True)
        steps = {name: x.step() for name, x in kinds.items()}
        times = self._times(steps)
        rows = []
        for name, x in kinds.items():
            sparse = None if name == "dense" else control.summary(x.transformer, strict=True)
            row: Row = {
                "part": part,
                "kind": name,
                "density": None if sparse is None else sparse.density,
                **times[name],
                "steps_per_second": 1 / times[name]["seconds"]["p50"],
                "saved_bytes": saved_bytes(x, x.tensors()),
                "peak_bytes": peak_bytes(steps[name], self.device),
            }
            rows.append(row)
        return compared(rows)

    def _times(self, steps: Functions) -> dict[str, Row]:
        """Return the seconds of each kind; on a CPU also its CPU time, and the number of cores that other processes used."""
        if self.device != "cpu":
            wall = seconds(steps, self.repeats, self.device)
            return {
                name: {"seconds": summary(x), "cpu_seconds": None, "timed_steps": len(x)}
                for name, x in wall.items()
            }
        found = undisturbed(steps, self.repeats, self.most_rounds)
        return {name: _cpu_row(x) for name, x in found.items()}


def _cpu_row(times: list[Timed]) -> Row:
    others = [x.others for x in times if x.others is not None]
    return {
        "seconds": summary([x.wall for x in times]),
        "cpu_seconds": summary([x.cpu for x in times]),
        "timed_steps": len(times),
        "disturbed": not all(x.is_quiet for x in times),
        "other_cores": sum(others) / len(others) if others else None,
    }


def compared(rows: list[Row]) -> list[Row]:
    """Return the rows of a part with their ratios to dense training.

    Args:
        rows: rows with "seconds", "cpu_seconds", "saved_bytes" and "peak_bytes".
    """
    dense = next(x for x in rows if x["kind"] == "dense")

    def shares(row: Row) -> Row:
        found = {
            "time_share": row["seconds"]["p50"] / dense["seconds"]["p50"],
            "cpu_time_share": None,
            "speedup": dense["seconds"]["p50"] / row["seconds"]["p50"],
            "saved_share": row["saved_bytes"] / dense["saved_bytes"],
            "peak_share": row["peak_bytes"] / dense["peak_bytes"],
        }
        if row["cpu_seconds"] is not None:
            found["cpu_time_share"] = row["cpu_seconds"]["p50"] / dense["cpu_seconds"]["p50"]
        return {**row, **found}

    return [shares(row) for row in rows]


def misses(rows: list[Row]) -> list[str]:
    """Return the missed bounds as text. Bounds exist for the transformer and for a block."""
    bounds = {"time_share": TIME_BOUND, "saved_share": MEMORY_BOUND, "peak_share": MEMORY_BOUND}
    return [
        f"{row['part']}, {row['kind']}: {name} {row[name]:.2f}, bound {bound}"
        for row in rows
        if row["kind"] != "dense" and row["part"] != "attention"
        for name, bound in bounds.items()
        if row[name] > bound
    ]


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a Markdown table, with ratios to dense training."""
    lines = [
        "| part | attention | seconds | share | CPU share | speed-up | kept MiB | share | peak MiB | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu = "" if row["cpu_time_share"] is None else f"{row['cpu_time_share']:.2f}"
        kept, peak = (row[name] / 2**20 for name in ("saved_bytes", "peak_bytes"))
        lines.append(
            f"| {row['part']} | {row['kind']} | {row['seconds']['p50']:.2f} | {row['time_share']:.2f} | {cpu} "
            f"| {row['speedup']:.2f}x | {kept:.0f} | {row['saved_share']:.2f} | {peak:.0f} | {row['peak_share']:.2f} |"
        )
    return lines
