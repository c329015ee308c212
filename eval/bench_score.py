"""Measure seconds and memory of scoring, next to torchmetrics.

python eval/bench_score.py --output eval/results/score_cpu.json

Images: demo stills and noisy copies as png files. Both use the shipped extractor; torchmetrics reads the files
with Pillow in the same batches. Fréchet: the step from statistics of 2,048 features to the distance. Every
part runs in its own process, the parts in turn. Times are medians.
"""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from dit_accel.environment import machine, versions
from dit_accel.eval.metrics.distances import FeatureSet, frechet_distance
from dit_accel.eval.metrics.features import tiny_extractor
from dit_accel.eval.metrics.score import score
from dit_accel.files import write_json

RECORD = {"id": "random", "sha256": "0" * 64, "resize": None}
BATCH = 32
LIBRARIES: list[torch.library.Library] = []  # kept alive


@dataclass
class Args:
    """Command line."""

    output: Path | None = None
    images: int = 2000
    features: int = 2048
    samples: int = 5000
    """Samples in each set of features; more than features."""
    repeats: int = 3
    threads: int = 2


def torchmetrics_fid(feature: Any) -> Any:
    """Return torchmetrics' FID of a network."""
    # `make install` puts torchvision into its own folder, because it may be built for another torch. Without
    # the names of two of its operators, which nothing here calls, torchmetrics cannot be imported next to it.
    sys.path.append(str(Path(sys.prefix) / "torchvision"))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            LIBRARIES[0].define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    except ImportError:
        pass
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(feature)


def draw(folder: Path, count: int) -> None:
    """Write stills, and the same stills with a little noise."""
    from PIL import Image

    from dit_accel.demo.clips import STILL, draw_clips, render_stills

    rng = np.random.default_rng(0)
    for name in ("samples", "reference"):
        (folder / name).mkdir()
    stills = draw_clips(count, torch.Generator().manual_seed(0), placement=STILL)
    for i in range(0, count, 100):
        images = ((render_stills(stills[i : i + 100]) + 1) * 127.5).round().byte()
        for j, image in enumerate(images.permute(0, 2, 3, 1).numpy(), start=i):
            noisy = (image + rng.normal(0, 8, image.shape)).round().clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / "reference" / f"{j:05d}.png")
            Image.fromarray(noisy).save(folder / "samples" / f"{j:05d}.png")


def ours(folder: Path, metrics: tuple[str, ...] | None) -> Callable[[], float]:
    """Return a function that scores the folders and returns fd_tiny."""
    tiny_extractor()

    def run() -> float:
        found = score(
            folder / "samples",
            reference=folder / "reference",
            metrics=metrics,
            batch_size=BATCH,
            progress=False,
        )
        return found["fd_tiny"]["value"]

    return run


def theirs(folder: Path) -> Callable[[], float]:
    """Return a function that scores the same files with torchmetrics."""
    from PIL import Image

    class Features(torch.nn.Module):
        num_features = 64

        def __init__(self) -> None:
            super().__init__()
            self.module = tiny_extractor().module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x / 255)

    fid = torchmetrics_fid(Features())

    def run() -> float:
        for name, real in (("samples", False), ("reference", True)):
            paths = sorted((folder / name).iterdir())
            for i in range(0, len(paths), BATCH):
                images = [np.asarray(Image.open(x).convert("RGB")) for x in paths[i : i + BATCH]]
                batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
                fid.update(batch, real=real)
        return fid.compute().item()

    return run


def random_features(args: Args, which: int) -> torch.Tensor:
    """Return correlated rows with a spectrum as steep as Inception's."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(args.features, args.features, generator=generator)
    mixing *= torch.logspace(0, -2, args.features)[:, None] / args.features**0.5
    rows = torch.randn(args.samples, args.features, generator=torch.Generator().manual_seed(which))
    return (rows @ mixing + 0.4 + 0.05 * which).relu()


def our_distance(args: Args) -> Callable[[], float]:
    """Return a function that computes the distance from our sums."""
    sets = []
    for which in (0, 1):
        sets.append(FeatureSet(RECORD, args.features, keep=0))
        rows = random_features(args, which)
        sets[-1].add(rows, [str(i) for i in range(len(rows))])
    return lambda: frechet_distance(*sets)


def their_distance(args: Args) -> Callable[[], float]:
    """Return a function that computes the distance from torchmetrics' sums."""

    class Same(torch.nn.Module):
        num_features = args.features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    fid = torchmetrics_fid(Same()).set_dtype(torch.float64)
    for which in (0, 1):
        fid.update(random_features(args, which).double(), real=bool(which))
    fid._computed = None
    return lambda: fid.compute().item()


def measured(prepare: Callable[..., Callable[[], float]], threads: int, *args: Any) -> dict:
    """Return seconds, value and memory of the function that `prepare` returns."""
    torch.set_num_threads(threads)
    run = prepare(*args)
    for first in (torch.linalg.cholesky, torch.linalg.eigvalsh, torch.linalg.eigvals):
        first(torch.eye(64, dtype=torch.float64))  # loads the library
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    value = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "value": value,
        "peak_bytes": 1024 * peak,
        "growth_bytes": 1024 * (peak - before),
    }


def alone(prepare: Callable[..., Callable[[], float]], threads: int, *args: Any) -> dict:
    """Run `measured` in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured, prepare, threads, *args).result()


def summary(runs: list[dict]) -> dict[str, Any]:
    """Return medians, and the seconds of every run."""
    names = ("seconds", "cpu_seconds", "value", "peak_bytes", "growth_bytes")
    return {
        **{name: statistics.median(run[name] for run in runs) for name in names},
        "each_seconds": [run["seconds"] for run in runs],
    }


def compared(parts: dict[str, tuple], args: Args) -> dict[str, dict[str, Any]]:
    """Run each part `repeats` times, the parts in turn."""
    runs: dict[str, list[dict]] = {name: [] for name in parts}
    for i in range(args.repeats):
        for name, part in parts.items():
            runs[name].append(alone(part[0], args.threads, *part[1:]))
            print(f"{i + 1}/{args.repeats} {name}: {runs[name][-1]['seconds']:.1f} s", flush=True)
    return {name: summary(x) for name, x in runs.items()}


def main(args: Args) -> None:
    result: dict[str, Any] = {"format_version": 1, "settings": {**vars(args)}}
    del result["settings"]["output"]
    with tempfile.TemporaryDirectory() as name:
        folder, half = Path(name) / "all", Path(name) / "half"
        for place, count in ((folder, args.images), (half, args.images // 2)):
            place.mkdir()
            draw(place, count)
        images = compared(
            {
                "fd_tiny": (ours, folder, ("fd_tiny",)),
                "torchmetrics": (theirs, folder),
                "all default metrics": (ours, folder, None),
                "all default metrics, half of the images": (ours, half, None),
            },
            args,
        )
    frechet = compared({"eigh": (our_distance, args), "torchmetrics": (their_distance, args)}, args)
    result |= {"images": images, "frechet": frechet}
    result["ratios"] = {
        "images: torchmetrics / fd_tiny, seconds": (
            images["torchmetrics"]["seconds"] / images["fd_tiny"]["seconds"]
        ),
        "frechet: torchmetrics / eigh, seconds": (
            frechet["torchmetrics"]["seconds"] / frechet["eigh"]["seconds"]
        ),
        "frechet: torchmetrics / eigh, seconds of CPU": (
            frechet["torchmetrics"]["cpu_seconds"] / frechet["eigh"]["cpu_seconds"]
        ),
        "frechet: eigh / torchmetrics - 1, value": (
            frechet["eigh"]["value"] / frechet["torchmetrics"]["value"] - 1
        ),
        "images: fd_tiny / torchmetrics - 1, value": (
            images["fd_tiny"]["value"] / images["torchmetrics"]["value"] - 1
        ),
    }
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.3g}")
    for name, part in images.items():
        print(f"{name}: {part['seconds']:.1f} s, memory + {part['growth_bytes'] / 1e6:.0f} MB")
    if args.output is not None:
        write_json(args.output, {**result, "versions": versions(), "machine": machine()})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
