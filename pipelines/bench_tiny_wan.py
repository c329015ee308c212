"""What sparse attention costs in quality and time on the embedded model, all in one run.

    python pipelines/bench_tiny_wan.py --output pipelines/results/tiny_wan.json

Quality: the same prompts and seeds dense, sparse (preset, crossover="never"), and with a random plan
of the same density as control; judged by `dit_accel.demo`, paired, with a bootstrap interval; PSNR
on raw frames. Time: dense against crossover="auto" and "never" at the model's own size.
"""

import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import tyro
from tqdm import tqdm

from dit_accel import SLAConfig, SparseWanPipeline, control
from dit_accel.demo import SAMPLING
from dit_accel.demo.report import METRICS, generate, judged_clips, score_clips
from dit_accel.environment import machine, versions
from dit_accel.files import asset, write_json
from dit_accel.pipelines.generate import Sampling, run_once


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
    repeats: int = 9
    """Timed runs of each kind."""
    seed: int = 0
    device: str = "cpu"


def random_router(seed: int) -> Any:
    """Stands in for `block_scores`: the same shapes, no information."""
    generator = torch.Generator().manual_seed(seed)

    def scores(
        q: torch.Tensor, k: torch.Tensor, *, block_q: int, block_k: int, **_: Any
    ) -> torch.Tensor:
        blocks = (-(-q.shape[2] // block_q), -(-k.shape[2] // block_k))
        return torch.rand((*q.shape[:2], *blocks), generator=generator).to(q.device)

    return scores


def psnr_each(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """dB of each clip `[N, 3, T, H, W]` in [-1, 1]."""
    error = (a.double() - b.double()).square().mean((1, 2, 3, 4)) / 4
    return (-10 * error.clamp(min=1e-12).log10()).tolist()


def paired(dense: list[dict], other: list[dict], metric: str) -> dict[str, Any]:
    """Accuracy difference in points with a bootstrap interval over clips."""
    a, b = (
        np.array([r["right"][metric] for r in records], dtype=float) for records in (dense, other)
    )
    draws = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    differences = (b - a)[draws].mean(1) * 100
    low, high = np.percentile(differences, [2.5, 97.5])
    return {
        "dense": a.mean(),
        "other": b.mean(),
        "difference_points": 100 * (b - a).mean(),
        "interval_95": [low, high],
    }


def quality(pipe: Any, config: SLAConfig, args: Args) -> dict[str, Any]:
    records: dict[str, list[dict]] = {"dense": [], "sparse": [], "random plan": []}
    psnr: dict[str, list[float]] = {"sparse": [], "random plan": []}
    density: dict[str, Any] = {}
    with tqdm(total=args.clips + args.heldout, desc="clips") as bar:
        for split, count in (("train", args.clips), ("heldout", args.heldout)):
            asked = judged_clips(split, count, args.seed)
            prompts = asked.captions()
            for i in range(0, count, args.batch_size):
                seeds = [args.seed + k for k in range(i, min(i + args.batch_size, count))]
                clips = {}
                for kind in records:
                    if kind != "dense":
                        control.enable(pipe, sla=config)
                        if kind == "random plan":
                            control.session_of(pipe).sla.router = random_router(i)
                    clips[kind] = generate(
                        pipe, prompts[i : i + args.batch_size], seeds, **SAMPLING
                    )
                    if kind != "dense":
                        report = control.summary(pipe, strict=True)
                        density[kind] = {
                            "density": report.density,
                            "overall_density": report.overall_density,
                        }
                        control.disable(pipe)
                        psnr[kind] += psnr_each(clips["dense"], clips[kind])
                    scored = score_clips(clips[kind], asked[i : i + args.batch_size])
                    records[kind] += [{"split": split, **record} for record in scored]
                bar.update(len(seeds))
    result: dict[str, Any] = {"clips": args.clips, "heldout": args.heldout, "density": density}
    for kind in ("sparse", "random plan"):
        mean, deviation = statistics.mean(psnr[kind]), statistics.stdev(psnr[kind])
        result[kind] = {
            "psnr_db": {"mean": mean, "standard_error": deviation / len(psnr[kind]) ** 0.5},
            **{metric: paired(records["dense"], records[kind], metric) for metric in METRICS},
        }
    gain = np.array(psnr["sparse"]) - np.array(psnr["random plan"])
    result["psnr_gain_over_random_db"] = {
        "mean": gain.mean(),
        "standard_error": gain.std(ddof=1) / len(gain) ** 0.5,
    }
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
    result: dict[str, Any] = {"format_version": 1, "sampling": SAMPLING, "sla": config.to_dict()}
    result["speed"] = speed(pipe, config, args)
    print(
        f"denoising, speed-up over dense: {result['speed']['speedup']}; auto: {result['speed']['auto_dense_calls']}"
    )
    result["quality"] = quality(pipe, config, args)
    for kind in ("sparse", "random plan"):
        x = result["quality"][kind]
        print(f"{kind}: {result['quality']['density'][kind]}")
        print(
            f"  PSNR to dense {x['psnr_db']['mean']:.2f} +- {x['psnr_db']['standard_error']:.2f} dB"
        )
        for metric in METRICS:
            low, high = x[metric]["interval_95"]
            print(
                f"  {metric:7} dense {x[metric]['dense']:.3f}  {kind} {x[metric]['other']:.3f}  "
                f"difference {x[metric]['difference_points']:+.1f} points [{low:+.1f}, {high:+.1f}]"
            )
    gain = result["quality"]["psnr_gain_over_random_db"]
    print(f"sparse is {gain['mean']:.2f} +- {gain['standard_error']:.2f} dB above the random plan")
    result |= {"versions": versions(), "machine": machine()}
    if args.output is not None:
        write_json(args.output, result)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
