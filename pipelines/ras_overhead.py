"""Seconds of region-adaptive steps on real geometries with random weights (part of bench_ras.py)."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_accel import control
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Geometry:
    """A transformer with random weights and the size of its input."""

    name: str
    build: Callable[[], Any]
    """The transformer, on the default device."""
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]
    """Arguments of one call, without the timestep."""
    guided: bool
    """Whether both halves of guidance come in one batch; else they are two calls."""


def _wan(dim: int, layers: int, heads: int, ffn: int, grid: tuple[int, int, int], text: int) -> Any:
    from diffusers import WanTransformer3DModel

    def build() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=dim // heads,
            in_channels=16,
            out_channels=16,
            text_dim=text,
            freq_dim=256,
            ffn_dim=ffn,
            num_layers=layers,
        )

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        t, h, w = grid
        return {
            "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 512, text, device=device, dtype=dtype),
        }

    return build, inputs


def _sd3_medium() -> Any:
    from diffusers import SD3Transformer2DModel

    def build() -> Any:
        return SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 16, 128, 128, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(2, 333, 4096, device=device, dtype=dtype),
            "pooled_projections": torch.randn(2, 2048, device=device, dtype=dtype),
        }

    return build, inputs


def _lumina_next() -> Any:
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    def build() -> Any:
        model = LuminaNextDiT2DModel(num_layers=24, num_kv_heads=8)
        torch.nn.init.zeros_(model.pad_token)
        return model

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 128, 128, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(2, 256, 2048, device=device, dtype=dtype),
            "encoder_mask": torch.ones(2, 256, device=device, dtype=torch.int64),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(72, 384, 384),
            "cross_attention_kwargs": {},
        }

    return build, inputs


def geometries(device: str) -> list[Geometry]:
    if device == "cpu":
        small = _wan(1024, 6, 8, 4096, (4, 32, 32), 512)
        return [Geometry("wan-dim1024-6layers-4096tokens", *small, guided=False)]
    wan = _wan(1536, 30, 12, 8960, (21, 30, 52), 4096)
    return [
        Geometry("sd3-medium-1024", *_sd3_medium(), guided=True),
        Geometry("lumina-next-1024", *_lumina_next(), guided=True),
        Geometry("wan2.1-1.3b-480p-81", *wan, guided=False),
    ]


class Loop:
    """As much of a pipeline as an acceleration looks at: a transformer, a scheduler, guidance."""

    def __init__(self, transformer: Any, guided: bool) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.do_classifier_free_guidance = guided

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], steps: int) -> list[float]:
        """Seconds of each step."""
        latents = inputs["hidden_states"]
        device = latents.device
        self.scheduler.set_timesteps(steps, device=device)
        marks = []
        for t in self.scheduler.timesteps:
            _wait(device)
            start = time.perf_counter()
            call = {**inputs, "hidden_states": latents, "timestep": t.expand(latents.shape[0])}
            velocity = self.transformer(**call, return_dict=False)[0][:, : latents.shape[1]]
            _wait(device)
            marks.append(time.perf_counter() - start)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            latents = latents.to(inputs["hidden_states"].dtype)
        return marks


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
                steps = [] if ras is None else control.summary(loop, strict=True).ras.steps
                control.disable(loop)
                if i == 0:
                    continue  # warms up, and compiles
                if ras is None:
                    seconds[name] += marks
                    continue
                seconds[name] += [marks[s.step] for s in steps if s.mode == "ras"]
                dense[name] += [marks[s.step] for s in steps if s.mode == "dense"]
                shares[name] = next(s.cost for s in steps if s.mode == "ras")
        rows = []
        plain = statistics.median(seconds["plain"])
        for name in list(kinds)[1:]:
            step = statistics.median(seconds[name])
            row = {
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


def family_blocks(transformer: Any) -> list[Any]:
    """The repeated blocks of a transformer."""
    names = ("blocks", "transformer_blocks", "noise_refiner", "layers")
    return [block for name in names for block in getattr(transformer, name, [])]
