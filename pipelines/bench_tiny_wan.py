"""What sparse attention costs in quality and time on the embedded model, all in one run.

    python pipelines/bench_tiny_wan.py --output pipelines/results/tiny_wan.json

Quality: the same prompts and seeds dense, sparse (preset, crossover="never"), and with a random plan
of the same density as control; judged by `dit_accel.demo`, paired, with a bootstrap interval; PSNR
on raw frames. Time: dense against crossover="auto" and "never" at the model's own size.
"""

import json
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import tyro
from quality_subject import random_router
from tqdm import tqdm

from dit_accel import SLAConfig, SparseWanPipeline, control
from dit_accel.demo import SAMPLING
from dit_accel.demo.report import METRICS, generate, judged_clips, score_clips
from dit_accel.environment import machine, versions
from dit_accel.files import asset, write_json
from dit_accel.pipelines.generate import Sampling, run_once

# The captions have at most 13 tokens, and the model was trained with them padded to 16 too.
QUALITY_SAMPLING = {**SAMPLING, "max_sequence_length": 16}


@dataclass
class Args:
    """Command line."""

    output: Path | None = None
    model: str | None = None
    """Default: the embedded tiny-wan."""
    preset: str = "balanced"
    clips: int = 288
    """Of combinations seen in training."""
    heldout: int = 96
    batch_size: int = 8
    control_every: int = 4
    """The random-plan control runs on every n-th batch."""
    repeats: int = 9
    """Timed runs of each kind."""
    seed: int = 0
    device: str = "cpu"
    parts: tuple[Literal["speed", "quality"], ...] = ("speed", "quality")
    """What to measure; the other part of an existing output file is kept."""


def psnr_each(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """dB of each clip `[N, 3, T, H, W]` in [-1, 1]."""
    error = (a.double() - b.double()).square().mean((1, 2, 3, 4)) / 4
    return (-10 * error.clamp(min=1e-12).log10()).tolist()


def mean_and_error(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "standard_error": error}


def paired(records: list[tuple[dict, dict]], metric: str) -> dict[str, Any]:
    """Accuracy difference in points with a bootstrap interval over clips."""
    a, b = (np.array([pair[i]["right"][metric] for pair in records], dtype=float) for i in range(2))
    draws = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    low, high = np.percentile((b - a)[draws].mean(1) * 100, [2.5, 97.5])
    return {
        "dense": float(a.mean()),
        "other": float(b.mean()),
        "difference_points": float(100 * (b - a).mean()),
        "interval_95": [float(low), float(high)],
    }


def quality(pipe: Any, config: SLAConfig, args: Args) -> dict[str, Any]:
    kinds = ("dense", "sparse", "random plan")
    records: dict[str, dict[tuple[str, int], dict]] = {kind: {} for kind in kinds}
    psnr: dict[str, dict[tuple[str, int], float]] = {kind: {} for kind in kinds[1:]}
    density: dict[str, Any] = {}
    with tqdm(total=args.clips + args.heldout, desc="clips") as bar:
        for split, count in (("train", args.clips), ("heldout", args.heldout)):
            asked = judged_clips(split, count, args.seed)
            prompts = asked.captions()
            for i in range(0, count, args.batch_size):
                stop = min(i + args.batch_size, count)
                seeds = [args.seed + k for k in range(i, stop)]
                names = [(split, k) for k in range(i, stop)]
                control_too = i // args.batch_size % args.control_every == 0
                clips: dict[str, torch.Tensor] = {}
                for kind in kinds if control_too else kinds[:2]:
                    if kind != "dense":
                        control.enable(pipe, sla=config)
                        if kind == "random plan":
                            control.session_of(pipe).sla.set_router(random_router(i))
                    clips[kind] = generate(pipe, prompts[i:stop], seeds, **QUALITY_SAMPLING)
                    if kind != "dense":
                        report = control.summary(pipe, strict=True)
                        density[kind] = {
                            "density": report.density,
                            "overall_density": report.overall_density,
                        }
                        control.disable(pipe)
                        psnr[kind] |= zip(
                            names, psnr_each(clips["dense"], clips[kind]), strict=True
                        )
                    records[kind] |= zip(
                        names, score_clips(clips[kind], asked[i:stop]), strict=True
                    )
                bar.update(len(seeds))
    result: dict[str, Any] = {
        "clips": args.clips,
        "heldout": args.heldout,
        "sampling": QUALITY_SAMPLING,
        "density": density,
    }
    for kind in kinds[1:]:
        both = [(records["dense"][name], record) for name, record in records[kind].items()]
        result[kind] = {
            "clips": len(both),
            "psnr_db": mean_and_error(list(psnr[kind].values())),
            **{metric: paired(both, metric) for metric in METRICS},
        }
    gain = [psnr["sparse"][name] - x for name, x in psnr["random plan"].items()]
    result["psnr_gain_over_random_db"] = mean_and_error(gain)
    return result


def speed(pipe: Any, config: SLAConfig, args: Args) -> dict[str, Any]:
    """Denoising seconds, alternating, and how much faster than dense."""
    kinds = {"dense": None, "auto": replace(config, crossover="auto"), "never": config}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sampling = Sampling(**SAMPLING)
    reasons: dict[str, int] = {}
    for i in tqdm(range(args.repeats + 1), desc="timing"):
        for kind, sla in kinds.items():
            if sla is not None:
                control.enable(pipe, sla=sla)
            _, took, report = run_once(pipe, "a red circle moving right", sampling, args.seed)
            control.disable(pipe)
            if kind == "auto":
                reasons = report.dense_calls
            if i:  # the first round warms up
                seconds[kind].append(took["denoise"])
    median = {kind: statistics.median(x) for kind, x in seconds.items()}
    ratios = {
        kind: statistics.median(a / b for a, b in zip(seconds["dense"], seconds[kind], strict=True))
        for kind in ("auto", "never")
    }
    return {"denoise_seconds": median, "speedup": ratios, "auto_dense_calls": reasons}


def main(args: Args) -> None:
    pipe = SparseWanPipeline.from_pretrained(args.model or asset("tiny-wan"), sla=None).to(
        args.device
    )
    pipe.set_progress_bar_config(disable=True)
    config = replace(SLAConfig.load(args.preset), crossover="never")
    result: dict[str, Any] = {}
    if args.output is not None and args.output.exists():
        result = json.loads(args.output.read_text())
    result |= {"format_version": 1, "sampling": SAMPLING, "sla": config.to_dict()}
    record = {"versions": versions(), "machine": machine()}
    if "speed" in args.parts:
        result["speed"] = speed(pipe, config, args) | record
        print(f"denoising, speed-up over dense: {result['speed']['speedup']}")
        print(f"dense calls with crossover='auto': {result['speed']['auto_dense_calls']}")
    if "quality" in args.parts:
        result["quality"] = quality(pipe, config, args) | record
        report_quality(result["quality"])
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)


def report_quality(result: dict[str, Any]) -> None:
    for kind in ("sparse", "random plan"):
        x = result[kind]
        print(f"{kind}: {result['density'][kind]}")
        print(
            f"  PSNR to dense {x['psnr_db']['mean']:.2f} +- {x['psnr_db']['standard_error']:.2f} dB"
        )
        for metric in METRICS:
            low, high = x[metric]["interval_95"]
            print(
                f"  {metric:7} dense {x[metric]['dense']:.3f}  {kind} {x[metric]['other']:.3f}  "
                f"difference {x[metric]['difference_points']:+.1f} points [{low:+.1f}, {high:+.1f}]"
            )
    gain = result["psnr_gain_over_random_db"]
    print(f"sparse is {gain['mean']:.2f} +- {gain['standard_error']:.2f} dB above the random plan")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
