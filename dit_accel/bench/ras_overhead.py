"""Seconds of region-adaptive steps on real geometries with random weights (part of bench_ras.py)."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_accel import control
from dit_accel.bench.geometries import Geometry, Loop, family_blocks, geometries
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 1


@dataclass
class Overhead:
    """Seconds of a region-adaptive step over those of a dense one, against counted FLOPs."""

    output: Path | None = None
    device: str = "cpu"
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    repeats: int = 3
    """Runs of each kind, alternating."""
    steps: int = 3
    """Region-adaptive steps of a run, after two dense ones; plain runs have as many."""
    compile: bool = True
    """Also with compiled blocks (on a GPU)."""
    time_limit_s: float | None = None
    """No new geometry is begun after so many seconds; what was not measured is named."""

    def run(self) -> None:
        rows: list[dict[str, Any]] = []
        left_out: list[str] = []
        start = time.perf_counter()
        # Compiled ones last: they take minutes, and a time limit should cost those first.
        for compiled in (False, True) if self.compile and self.device != "cpu" else (False,):
            for geometry in geometries(self.device):
                spent = time.perf_counter() - start
                if self.time_limit_s is not None and spent > self.time_limit_s:
                    left_out.append(f"{geometry.name}{' compiled' * compiled}")
                else:
                    rows += self.measure(geometry, compiled)
        if left_out:
            print(f"not measured within {self.time_limit_s:.0f} s: {', '.join(left_out)}")
        record = {"format_version": FORMAT_VERSION, "rows": rows, "not_measured": left_out}
        record |= {"versions": versions(), "machine": machine()}
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.output, record)

    def measure(self, geometry: Geometry, compiled: bool) -> list[dict[str, Any]]:
        device = torch.device(self.device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        with device:
            transformer = geometry.build().to(dtype).eval()
        loop = Loop(transformer, geometry.guided)
        inputs = geometry.inputs(device, dtype)
        kinds: dict[str, dict | None] = {"plain": None}
        for predictor in ("hold",) if compiled else ("hold", "linear"):
            kinds |= {
                f"{ratio} {predictor}": {
                    "ratio": ratio,
                    "kv_predictor": predictor,
                    "warmup": 2,
                    "resets": (),
                    "tail": 0,
                }
                for ratio in self.ratios
            }
        if compiled:
            for block in family_blocks(transformer):
                block.compile()
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        dense: dict[str, list[float]] = {name: [] for name in kinds}
        shares: dict[str, float] = {}
        for i in tqdm(range(self.repeats + 1), desc=f"{geometry.name}{' compiled' * compiled}"):
            for name, ras in kinds.items():
                if ras is not None:
                    control.enable(loop, ras=ras)
                marks = loop.run(inputs, self.steps + (0 if ras is None else 2))
                done = None if ras is None else control.summary(loop, strict=True).ras
                control.disable(loop)
                if i == 0:
                    continue  # warms up, and compiles
                if done is None:
                    seconds[name] += marks
                    continue
                steps = done.steps
                seconds[name] += [marks[s.step] for s in steps if s.mode == "partial"]
                dense[name] += [marks[s.step] for s in steps if s.mode == "dense"]
                shares[name] = next(s.cost for s in steps if s.mode == "partial")
        rows = []
        plain = statistics.median(seconds["plain"])
        for name in list(kinds)[1:]:
            step = statistics.median(seconds[name])
            row: dict[str, Any] = {
                "geometry": geometry.name,
                "compiled": compiled,
                "dtype": str(dtype).removeprefix("torch."),
                "ras": name,
                "plain_step_seconds": plain,
                "dense_step_seconds": statistics.median(dense[name]),
                "ras_step_seconds": step,
                "speedup": plain / step,
                "ideal": 1 / shares[name],
                "share_of_ideal": plain / step * shares[name],
            }
            rows.append(row)
            print(
                f"{geometry.name}{' compiled' * compiled}, {name}: {row['speedup']:.2f}x of {row['ideal']:.2f}x, "
                f"{100 * row['share_of_ideal']:.0f} % of ideal; a dense step takes "
                f"{row['dense_step_seconds'] / plain:.2f} of a plain one"
            )
        return rows
