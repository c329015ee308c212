"""Benchmark of scoring, next to torchmetrics (eval/bench_score.py)."""

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

from dit_accel.environment import machine, versions
from dit_accel.eval.metrics.distances import FeatureSet, frechet_distance
from dit_accel.eval.metrics.features import tiny_extractor
from dit_accel.eval.metrics.score import score
from dit_accel.eval.results.types import Extractor as ExtractorRecord
from dit_accel.files import write_json

RECORD = ExtractorRecord(id="random", sha256="0" * 64, resize=None)
BATCH = 32
FOLDERS = ("samples", "reference")
LIBRARIES: list[torch.library.Library] = []  # kept alive


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


def draw_images(folder: Path, count: int) -> None:
    """Write stills, and the same stills with a little noise."""
    from PIL import Image

    from dit_accel.demo.clips import STILL, draw_clips, render_stills

    rng = np.random.default_rng(0)
    for name in FOLDERS:
        (folder / name).mkdir()
    stills = draw_clips(count, torch.Generator().manual_seed(0), placement=STILL)
    for i in range(0, count, 100):
        images = ((render_stills(stills[i : i + 100]) + 1) * 127.5).round().byte()
        for j, image in enumerate(images.permute(0, 2, 3, 1).numpy(), start=i):
            noisy = (image + rng.normal(0, 8, image.shape)).round().clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / "reference" / f"{j:05d}.png")
            Image.fromarray(noisy).save(folder / "samples" / f"{j:05d}.png")


def our_scores(folder: Path, metrics: tuple[str, ...] | None) -> Callable[[], float]:
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
        value = found["fd_tiny"]["value"]
        assert value is not None
        return value

    return run


def their_fid(folder: Path) -> Callable[[], float]:
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


def random_features(samples: int, features: int, which: int) -> torch.Tensor:
    """Return correlated rows with a spectrum as steep as Inception's."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(features, features, generator=generator)
    mixing *= torch.logspace(0, -2, features)[:, None] / features**0.5
    rows = torch.randn(samples, features, generator=torch.Generator().manual_seed(which))
    return (rows @ mixing + 0.4 + 0.05 * which).relu()


def our_distance(samples: int, features: int) -> Callable[[], float]:
    """Return a function that computes the distance from our sums."""
    sets = []
    for which in (0, 1):
        sets.append(FeatureSet(RECORD, features, keep=0))
        rows = random_features(samples, features, which)
        sets[-1].add(rows, [str(i) for i in range(len(rows))])
    return lambda: frechet_distance(*sets)


def their_distance(samples: int, features: int) -> Callable[[], float]:
    """Return a function that computes the distance from torchmetrics' sums."""

    class Same(torch.nn.Module):
        num_features = features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    fid = torchmetrics_fid(Same()).set_dtype(torch.float64)
    for which in (0, 1):
        fid.update(random_features(samples, features, which).double(), real=bool(which))
    fid._computed = None
    return lambda: fid.compute().item()


def measured_run(prepare: Callable[..., Callable[[], float]], threads: int, *args: Any) -> dict:
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


def run_alone(prepare: Callable[..., Callable[[], float]], threads: int, *args: Any) -> dict:
    """Run `measured_run` in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured_run, prepare, threads, *args).result()


def medians(runs: list[dict]) -> dict[str, Any]:
    """Return medians, and the seconds of every run."""
    names = ("seconds", "cpu_seconds", "value", "peak_bytes", "growth_bytes")
    return {
        **{name: statistics.median(run[name] for run in runs) for name in names},
        "each_seconds": [run["seconds"] for run in runs],
    }


@dataclass
class ScoringSpeed:
    """Seconds and memory of scoring, and of the same metrics by torchmetrics."""

    output: Path | None = None
    """Results file. Default: print only."""
    images: int = 2000
    """Number of images in each folder."""
    features: int = 2048
    """Width of the features of the Fréchet distance."""
    samples: int = 5000
    """Samples in each set of features; more than features."""
    repeats: int = 3
    """Number of runs of each part."""
    threads: int = 2
    """Threads of torch."""

    def run(self) -> None:
        """Measure, print ratios and times, and write all numbers to `output`."""
        result: dict[str, Any] = {"format_version": 1, "settings": {**vars(self)}}
        del result["settings"]["output"]
        with tempfile.TemporaryDirectory() as name:
            folder, half = Path(name) / "all", Path(name) / "half"
            for place, count in ((folder, self.images), (half, self.images // 2)):
                place.mkdir()
                draw_images(place, count)
            images = self._compared(
                {
                    "fd_tiny": (our_scores, folder, ("fd_tiny",)),
                    "torchmetrics": (their_fid, folder),
                    "all default metrics": (our_scores, folder, None),
                    "all default metrics, half of the images": (our_scores, half, None),
                }
            )
        sizes = (self.samples, self.features)
        frechet = self._compared(
            {"eigh": (our_distance, *sizes), "torchmetrics": (their_distance, *sizes)}
        )
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
        if self.output is not None:
            write_json(self.output, {**result, "versions": versions(), "machine": machine()})

    def _compared(self, parts: dict[str, tuple]) -> dict[str, dict[str, Any]]:
        """Run each part `repeats` times, the parts in turn."""
        runs: dict[str, list[dict]] = {name: [] for name in parts}
        for i in range(self.repeats):
            for name, part in parts.items():
                runs[name].append(run_alone(part[0], self.threads, *part[1:]))
                print(
                    f"{i + 1}/{self.repeats} {name}: {runs[name][-1]['seconds']:.1f} s", flush=True
                )
        return {name: medians(x) for name, x in runs.items()}
