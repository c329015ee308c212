"""Benchmark of a transformer call: dense, sparse, region-adaptive and both (pipelines/bench_sla.py)."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from dit_accel import control
from dit_accel.bench.geometries import Geometry, Loop, geometries, large_videos, wait
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.runtime.install import method_of

FORMAT_VERSION = 1
# Names of diffusers' attention backends. Wan uses them; other models call SDPA.
DENSE_BACKENDS = ("_native_flash", "_native_cudnn")


@dataclass
class Speed:
    """Speed-up of a whole transformer call over dense, and the speed-up that the counted FLOPs allow."""

    output: Path | None = None
    device: str = "cpu"
    densities: tuple[float, ...] = (0.05, 0.1, 0.25)
    block: int = 64
    ras_ratio: float = 0.5
    repeats: int = 3
    """Number of runs of each kind, in turns."""
    steps: int = 3
    """Number of timed steps of a run."""
    time_limit_s: float | None = None
    """Seconds after which no new geometry is started. Geometries that were not measured are printed."""

    def run(self) -> None:
        rows: list[dict[str, Any]] = []
        left_out: list[str] = []
        start = time.perf_counter()
        for geometry in geometries("cpu") if self.device == "cpu" else large_videos():
            spent = time.perf_counter() - start
            if self.time_limit_s is not None and spent > self.time_limit_s:
                left_out.append(geometry.name)
            else:
                rows += self.measure(geometry)
        if left_out:
            print(f"not measured within {self.time_limit_s:.0f} s: {', '.join(left_out)}")
        record = {"format_version": FORMAT_VERSION, "rows": rows, "not_measured": left_out}
        record |= {"versions": versions(), "machine": machine()}
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.output, record)

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Return the settings of acceleration by name. Attention is sparse in every layer and step, so all steps are equal."""
        shared = {"block_q": self.block, "block_k": self.block, "crossover": "never"}
        shared |= {"dense_steps": 0, "dense_layers": 0}
        ras = {"ratio": self.ras_ratio, "kv_predictor": "hold"}
        ras |= {"warmup": 2, "resets": (), "tail": 0}
        kinds: dict[str, dict[str, Any]] = {"dense": {}}
        if self.device != "cpu":
            kinds |= {f"dense {name}": {} for name in DENSE_BACKENDS}
        kinds["ras"] = {"ras": ras}
        for density in self.densities:
            sla = {**shared, "topk": density}
            kinds[f"sla {density}"] = {"sla": sla}
            kinds[f"sla {density} + ras"] = {"sla": sla, "ras": ras}
        return kinds

    def measure(self, geometry: Geometry) -> list[dict[str, Any]]:
        device = torch.device(self.device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        with device:
            transformer = geometry.build().to(dtype).eval()
        loop = Loop(transformer, geometry.guided)
        inputs = geometry.inputs(device, dtype)
        kinds = self.kinds()
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        memory: dict[str, int] = {}
        reports: dict[str, Any] = {}
        for i in tqdm(range(self.repeats + 1), desc=geometry.name):
            for name, acceleration in kinds.items():
                if name.startswith("dense _"):
                    transformer.set_attention_backend(name.removeprefix("dense "))
                if acceleration:
                    control.enable(loop, **acceleration)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                marks = loop.run(inputs, self.steps + (2 if "ras" in acceleration else 0))
                if acceleration:
                    reports[name] = control.summary(loop, strict=True)
                control.disable(loop)
                if name.startswith("dense _"):
                    transformer.reset_attention_backend()
                if device.type == "cuda":
                    memory[name] = torch.cuda.max_memory_allocated()
                if i:  # the first round warms up
                    seconds[name] += marks[-self.steps :]
        attention = self.attention_seconds(loop, inputs, device)
        return self.rows(geometry, dtype, seconds, attention, reports, memory)

    def attention_seconds(self, loop: Loop, inputs: dict[str, Any], device: torch.device) -> float:
        """Return the seconds of all self-attention of a dense step: the time of SDPA in one layer times the layers."""
        noted: list[tuple[Any, ...]] = []
        sla = {"topk": 1.0, "crossover": "never", "dense_steps": 0, "dense_layers": 0}
        control.enable(loop, sla=sla)
        layers = method_of(loop, "sla").layers  # type: ignore[union-attr]
        module = next(iter(layers.values())).module
        forward = module.forward

        def noting(*qkv: torch.Tensor, **options: Any) -> Any:
            noted.append(qkv)
            return forward(*qkv, **options)

        module.forward = noting  # type: ignore[method-assign]
        loop.run(inputs, 1)
        control.disable(loop)
        marks = []
        for _ in range(3 * self.repeats + 1):
            wait(device)
            start = time.perf_counter()
            scaled_dot_product_attention(*noted[0])
            wait(device)
            marks.append(time.perf_counter() - start)
        return statistics.median(marks[1:]) * len(layers)

    def rows(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        seconds: dict[str, list[float]],
        attention: float,
        reports: dict[str, Any],
        memory: dict[str, int],
    ) -> list[dict[str, Any]]:
        median = {name: statistics.median(x) for name, x in seconds.items()}
        dense = median["dense"]
        best = min(x for name, x in median.items() if name.startswith("dense"))
        rows = []
        for name, step in median.items():
            row: dict[str, Any] = {
                "geometry": geometry.name,
                "dtype": str(dtype).removeprefix("torch."),
                "kind": name,
                "step_seconds": step,
                "speedup": dense / step,
                "speedup_over_best_dense": best / step,
                "peak_memory_bytes": memory.get(name),
            }
            if name == "dense":
                row["attention_seconds"] = attention
            if name.startswith("sla") and "ras" not in name:
                density = reports[name].overall_density
                ideal = dense - attention + density * attention
                row |= {"density": density, "ideal_speedup": dense / ideal}
                row["share_of_ideal"] = ideal / step
            if name.endswith("+ ras"):
                product = dense / median[name.removesuffix(" + ras")] * dense / median["ras"]
                row |= {"product_of_single": product, "share_of_product": dense / step / product}
            rows.append(row)
            print(_line(row))
        return rows


def _line(row: dict[str, Any]) -> str:
    text = f"{row['geometry']}, {row['kind']}: {row['step_seconds']:.3f} s, {row['speedup']:.2f}x"
    if "attention_seconds" in row:
        text += f", {row['attention_seconds']:.3f} s of it self-attention"
    if "ideal_speedup" in row:
        text += f" of {row['ideal_speedup']:.2f}x at density {row['density']:.3f}"
        text += f" ({100 * row['share_of_ideal']:.0f} %)"
    if "product_of_single" in row:
        text += f", {100 * row['share_of_product']:.0f} % of the product {row['product_of_single']:.2f}x"
    if row["peak_memory_bytes"]:
        text += f", {row['peak_memory_bytes'] / 2**30:.2f} GiB at the peak"
    return text
