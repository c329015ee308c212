"""Benchmark of partial and forecast steps on real geometries with random weights (pipelines/bench_ras.py)."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from dit_accel import control
from dit_accel.bench.geometries import Geometry, Loop, family_blocks, geometries
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 2


@dataclass
class Overhead:
    """Speed-up of partial steps over dense steps, and of runs with forecast steps over dense runs, against the ratios of
    counted FLOPs."""

    output: Path | None = None
    device: str = "cpu"
    parts: tuple[Literal["partial", "forecast"], ...] = ("partial", "forecast")
    """Parts to measure: "partial" steps, and whole runs with "forecast" steps."""
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    repeats: int = 3
    """Number of runs of each kind, in turns."""
    steps: int = 3
    """Region-adaptive steps of a run, after two dense steps. Plain runs have the same number of steps."""
    budgets: tuple[float, ...] = (0.75, 0.5)
    """Budgets of the runs with forecast steps."""
    run_steps: int = 12
    """Steps of a run with forecast steps."""
    compile: bool = True
    """On a GPU, also measure compiled blocks."""
    time_limit_s: float | None = None
    """Seconds after which no new geometry is started. Geometries that were not measured are printed."""

    def run(self) -> None:
        rows: list[dict[str, Any]] = []
        left_out: list[str] = []
        start = time.perf_counter()
        # Compiled geometries are last, because they take minutes and should be the first to be left out.
        for compiled in (False, True) if self.compile and self.device != "cpu" else (False,):
            for geometry in geometries(self.device):
                spent = time.perf_counter() - start
                if self.time_limit_s is not None and spent > self.time_limit_s:
                    left_out.append(f"{geometry.name}{' compiled' * compiled}")
                else:
                    if "partial" in self.parts:
                        rows += self.measure(geometry, compiled)
                    if "forecast" in self.parts:
                        rows += self.measure_runs(geometry, compiled)
        if left_out:
            print(f"not measured within {self.time_limit_s:.0f} s: {', '.join(left_out)}")
        record = {"format_version": FORMAT_VERSION, "rows": rows, "not_measured": left_out}
        record |= {"versions": versions(), "machine": machine()}
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.output, record)

    def _build(self, geometry: Geometry, compiled: bool) -> tuple[Loop, dict[str, Any], str]:
        """Return a loop, the arguments of its calls, and the name of the dtype."""
        device = torch.device(self.device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        with device:
            transformer = geometry.build().to(dtype).eval()
        if compiled:
            for block in family_blocks(transformer):
                block.compile()
        loop = Loop(transformer, geometry.guided)
        return loop, geometry.inputs(device, dtype), str(dtype).removeprefix("torch.")

    def measure_runs(self, geometry: Geometry, compiled: bool) -> list[dict[str, Any]]:
        """Return rows with the times of whole runs with forecast steps, and of their dense steps."""
        loop, inputs, dtype = self._build(geometry, compiled)
        plain: list[list[float]] = []
        runs: dict[float, list[list[float]]] = {x: [] for x in self.budgets}
        reports: dict[float, Any] = {}
        for i in tqdm(range(self.repeats + 1), desc=f"{geometry.name}, forecast"):
            marks = loop.run(inputs, self.run_steps)
            if i > 0:  # the first run warms up and compiles
                plain.append(marks)
            for budget, seen in runs.items():
                control.enable(loop, ras={"budget": budget})
                marks = loop.run(inputs, self.run_steps)
                reports[budget] = control.summary(loop, strict=True).ras
                control.disable(loop)
                if i > 0:
                    seen.append(marks)
        rows = []
        whole = statistics.median(sum(x) for x in plain)
        for budget, seen in runs.items():
            report = reports[budget]
            steps = [x.step for x in report.steps if x.mode == "dense"][1:]
            # Each step is compared with that of the neighbouring plain run, because the machine is shared.
            pairs = zip(seen, plain, strict=True)
            dense = [ours[k] / other[k] for ours, other in pairs for k in steps]
            seconds = statistics.median(sum(x) for x in seen)
            row = {
                "geometry": geometry.name,
                "compiled": compiled,
                "dtype": dtype,
                "ras": f"budget {budget}",
                "steps": self.run_steps,
                "plain_run_seconds": whole,
                "ras_run_seconds": seconds,
                "dense_step_over_plain": statistics.median(dense),
                "speedup": whole / seconds,
                "ideal": self.run_steps / report.cost,
                "share_of_ideal": whole / seconds * report.cost / self.run_steps,
            }
            rows.append(row)
            print(
                f"{geometry.name}{' compiled' * compiled}, {row['ras']}: {row['speedup']:.2f}x of {row['ideal']:.2f}x, "
                f"{100 * row['share_of_ideal']:.0f} % of ideal; a dense step takes "
                f"{row['dense_step_over_plain']:.3f} of a plain one"
            )
        return rows

    def measure(self, geometry: Geometry, compiled: bool) -> list[dict[str, Any]]:
        """Return rows with the times of partial steps of several ratios, and of the dense steps before them."""
        loop, inputs, dtype = self._build(geometry, compiled)
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
                    continue  # the first run warms up and compiles
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
                "dtype": dtype,
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
