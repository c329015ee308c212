"""What region-adaptive sampling costs in time and quality, all rows in one run.

    python pipelines/bench_ras.py overhead --output pipelines/results/ras_overhead_cpu.json
    python pipelines/bench_ras.py overhead --device cuda --output pipelines/results/ras_overhead_gpu.json
    python pipelines/bench_ras.py quality --model tiny-wan --output pipelines/results/ras_tiny_wan.json

Overhead: seconds of a region-adaptive step against a dense one of the same run, over the ratio of the
FLOPs that they count (`Family.flops`). Quality: paired seeds against the model's own 100-step dense
output from the same noise; every row names the cost it had, and "dense, equal cost" is the plain
pipeline with as many steps. A run that was stopped goes on where it was.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import tyro
from tqdm import tqdm

from dit_accel import control, demo
from dit_accel.config import RASConfig
from dit_accel.demo.clips import describe_clips
from dit_accel.demo.report import judged_clips, judged_stills, score_clips
from dit_accel.demo.vocabulary import Combination
from dit_accel.environment import machine, versions
from dit_accel.files import asset, write_json

FORMAT_VERSION = 1


# Overhead -------------------------------------------------------------------------------------------


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

    def run(self) -> None:
        rows: list[dict[str, Any]] = []
        for geometry in geometries(self.device):
            for compiled in (False, True) if self.compile and self.device != "cpu" else (False,):
                rows += self.measure(geometry, compiled)
        record = {"format_version": FORMAT_VERSION, "rows": rows}
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
        for predictor in ("hold", "linear"):
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


# Quality --------------------------------------------------------------------------------------------

METRICS = ("psnr_db", "ssim", "latent_error", "right")
REFERENCE_STEPS = 100
OURS = ("ours, K/V held", "ours, K/V linear")
HOLD = {"predictor": "hold", "kv_predictor": "hold"}


@dataclass(frozen=True)
class Row:
    """One way to sample."""

    kind: str
    solver: str
    steps: int
    ratio: float | None = None
    ras: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return f"{self.solver} {self.steps} {self.ratio or ''} {self.kind}"


def rows_of(solver: str, steps: int, ratios: tuple[float, ...]) -> list[Row]:
    """The plain pipeline, and every way to spare with each ratio; the cost of "ours" sets the plain
    pipeline's steps at equal cost, which is why those rows come last."""
    rows = [Row("dense", solver, steps)]
    for ratio in ratios:
        ways = {
            "random tokens, held": {"selection": "random", **HOLD},
            "paper": RASConfig.PRESETS["paper"],
            OURS[0]: {"kv_predictor": "hold"},
            OURS[1]: {"kv_predictor": "linear"},
        }
        rows += [Row(k, solver, steps, ratio, {**ras, "ratio": ratio}) for k, ras in ways.items()]
        rows.append(Row("dense, equal cost", solver, steps, ratio))
    return rows


class Subject:
    """A trained model and what is asked of it."""

    def __init__(self, model: str, count: int) -> None:
        from dit_accel.pipelines.generate import load

        self.still = "sd3" in Path(model).name
        path = Path(model)
        self.pipe = load(path if path.is_dir() else asset(model), sla=None, device="auto")
        self.pipe.set_progress_bar_config(disable=True)
        sampling = demo.IMAGE_SAMPLING if self.still else demo.SAMPLING
        # The captions have at most 13 tokens; the clip models were trained with 16 too.
        self.sampling = dict(sampling) | ({} if self.still else {"max_sequence_length": 16})
        del self.sampling["num_inference_steps"]
        self.asked = self._asked(path.name, count)
        self.prompts = self.asked.captions(with_motion=not self.still)
        self.shipped = self.pipe.scheduler

    def _asked(self, name: str, count: int) -> Any:
        if self.still:
            return judged_stills("train", count)
        if name != "tiny-wan-start":
            return judged_clips("train", count)
        # That model knows three shapes, six colours, four motions and one form of caption.
        every = [Combination(*c) for c in itertools.product(range(3), range(6), range(4))]
        generator = torch.Generator().manual_seed(0)
        order = [i for _ in range(-(-count // 72)) for i in torch.randperm(72, generator=generator)]
        clips = describe_clips([every[i] for i in order[:count]], generator)
        return replace(clips, template=torch.zeros(count, dtype=torch.long))

    def set_solver(self, name: str) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

        config = self.shipped.config
        shift = config.get("flow_shift", config.get("shift", 3.0))
        if name == "euler":
            self.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        else:
            self.pipe.scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )

    def latents(self, rows: range, steps: int, ras: dict | None) -> tuple[torch.Tensor, float]:
        """Latents of these samples, and the cost in dense steps."""
        if ras is not None:
            control.enable(self.pipe, ras=ras)
        try:
            out = self.pipe(
                [self.prompts[i] for i in rows],
                generator=[torch.Generator().manual_seed(i) for i in rows],
                num_inference_steps=steps,
                output_type="latent",
                **self.sampling,
            )
            report = control.summary(self.pipe).ras
        finally:
            control.disable(self.pipe)
        latents = out.images if self.still else out.frames
        return latents.cpu(), float(steps) if report is None else report.cost

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames `[N, 3, T, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype)
        if self.still:
            z = latents / vae.config.scaling_factor + vae.config.shift_factor
            return vae.decode(z).sample.clamp(-1, 1).float().cpu()[:, :, None]
        shape = (1, -1, 1, 1, 1)
        mean, std = (
            torch.tensor(vae.config[name]).view(shape).to(latents)
            for name in ("latents_mean", "latents_std")
        )
        return vae.decode(latents * std + mean).sample.clamp(-1, 1).float().cpu()

    def score(
        self, latents: torch.Tensor, reference: torch.Tensor, rows: range
    ) -> list[tuple[float, ...]]:
        """`METRICS` of each sample against the reference."""
        from torchmetrics.functional.image import structural_similarity_index_measure as similarity

        video, truth = self.decode(latents), self.decode(reference)
        right = score_clips(video, self.asked[rows.start : rows.stop], still=self.still)
        scores = []
        for i in range(len(latents)):
            error = (video[i] - truth[i]).double().square().mean() / 4
            frames = [(x[i].transpose(0, 1) + 1) / 2 for x in (video, truth)]
            latent = (latents[i] - reference[i]).norm() / reference[i].norm()
            scores.append(
                (
                    float(-10 * error.clamp(min=1e-12).log10()),
                    float(similarity(*frames, data_range=1.0)),
                    float(latent),
                    float(right[i]["right"]["all"]),
                )
            )
        return scores


@dataclass
class Quality:
    """Paired quality of every way to spare, against dense sampling at equal cost."""

    output: Path
    model: str = "tiny-wan"
    """tiny-wan, tiny-sd3, or a folder."""
    samples: int = 96
    batch_size: int = 8
    solvers: tuple[str, ...] = ("unipc", "euler")
    steps: tuple[int, ...] = (20, 50, 10)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    work: Path | None = None
    """Scores of single samples, kept so that a stopped run goes on. Default: beside the output."""

    def run(self) -> None:
        work = self.work or self.output.with_suffix(".work.json")
        scores: dict[str, Any] = json.loads(work.read_text()) if work.exists() else {}
        subject = Subject(self.model, self.samples)
        plan = [row for s in self.solvers for n in self.steps for row in rows_of(s, n, self.ratios)]
        bar = tqdm(total=len(plan) * self.samples, desc=self.model)
        for start in range(0, self.samples, self.batch_size):
            rows = range(start, min(start + self.batch_size, self.samples))
            todo = [row for row in plan if str(rows[-1]) not in scores.get(row.key, {})]
            bar.update((len(plan) - len(todo)) * len(rows))
            if not todo:
                continue
            subject.set_solver("unipc")
            reference, _ = subject.latents(rows, REFERENCE_STEPS, None)
            for row in todo:
                self._add(subject, row, rows, reference, scores)
                write_json(work, scores)
                bar.update(len(rows))
        bar.close()
        write_json(self.output, self.report(subject, plan, scores))
        print_table(json.loads(self.output.read_text()))

    def _add(
        self, subject: Subject, row: Row, rows: range, reference: torch.Tensor, scores: dict
    ) -> None:
        subject.set_solver(row.solver)
        steps = row.steps
        if row.kind == "dense, equal cost":
            ours = Row(OURS[0], row.solver, row.steps, row.ratio)
            steps = max(1, round(scores[ours.key]["cost"]))
        latents, cost = subject.latents(rows, steps, row.ras)
        entry = scores.setdefault(row.key, {})
        entry["cost"] = cost
        for i, values in zip(rows, subject.score(latents, reference, rows), strict=True):
            entry[str(i)] = values

    def report(self, subject: Subject, plan: list[Row], scores: dict[str, Any]) -> dict[str, Any]:
        def column(row: Row) -> np.ndarray:
            return np.array([scores[row.key][str(i)] for i in range(self.samples)])

        by_key = {row.key: column(row) for row in plan}
        rows = []
        for row in plan:
            record: dict[str, Any] = {
                "solver": row.solver,
                "steps": row.steps,
                "ratio": row.ratio,
                "kind": row.kind,
                "cost": scores[row.key]["cost"],
                **{name: mean_interval(by_key[row.key][:, i]) for i, name in enumerate(METRICS)},
            }
            if row.ratio is not None:
                for name, kind in (("paper", "paper"), ("equal_cost", "dense, equal cost")):
                    other = Row(kind, row.solver, row.steps, row.ratio).key
                    if other != row.key:
                        gap = by_key[row.key] - by_key[other]
                        record[f"minus_{name}"] = {
                            metric: mean_interval(gap[:, i]) for i, metric in enumerate(METRICS)
                        }
            rows.append(record)
        return {
            "format_version": FORMAT_VERSION,
            "model": Path(self.model).name,
            "samples": self.samples,
            "reference": f"dense, UniPC, {REFERENCE_STEPS} steps, the same noise",
            "sampling": subject.sampling,
            "rows": rows,
            "versions": versions(),
            "machine": machine(),
        }


def mean_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean, and a 95 % bootstrap interval over samples."""
    draws = np.random.default_rng(0).integers(0, len(values), (5000, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "interval_95": [float(low), float(high)]}


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['model']}, {report['samples']} samples, against {report['reference']}")
    print(
        "| sampling | ratio | cost | PSNR, dB | SSIM | latent error | judge | PSNR minus equal cost |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        gap = row.get("minus_equal_cost", {}).get("psnr_db")
        tail = (
            ""
            if gap is None
            else f"{gap['mean']:+.2f} [{gap['interval_95'][0]:+.2f}, {gap['interval_95'][1]:+.2f}]"
        )
        means = {name: row[name]["mean"] for name in METRICS}
        print(
            f"| {row['solver']} {row['steps']}, {row['kind']} | {row['ratio'] or ''} | {row['cost']:.2f} "
            f"| {means['psnr_db']:.2f} | {means['ssim']:.4f} | {means['latent_error']:.4f} "
            f"| {means['right']:.3f} | {tail} |"
        )


Command = (
    Annotated[Overhead, tyro.conf.subcommand("overhead")]
    | Annotated[Quality, tyro.conf.subcommand("quality")]
)

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,)).run()
