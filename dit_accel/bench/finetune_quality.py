"""Quality of the embedded model after each way of fine-tuning (part of bench_finetune.py)."""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import bootstrap
from tqdm import tqdm

from dit_accel.bench.finetune_rows import RECIPE, UNTRAINED, Row, learned, rows_of
from dit_accel.bench.subjects import METRICS, Subject, mean_interval
from dit_accel.environment import machine, versions
from dit_accel.eval.metrics.values import DRAWS
from dit_accel.files import atomic_path, write_json
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.data.manifest import MANIFEST, read_manifest
from dit_accel.finetune.data.open import TEACHER_FOLDER, open_samples
from dit_accel.finetune.families import trainable_of
from dit_accel.finetune.model import load_model
from dit_accel.finetune.recipe import load_config
from dit_accel.finetune.trainer import finetune

FORMAT_VERSION = 1
FIRST_SEED = 1000
"""Seed of the first sample. The recipe was tuned on samples with lower seeds."""
UNTUNED, RIVAL = "top-k, untuned", "shared_softmax, untuned"


@dataclass
class FinetuneQuality:
    """Paired quality of fine-tuned sparse attention against dense attention of the model before training."""

    output: Path
    topk: tuple[float, ...] = (0.1, 0.05)
    """Shares of the key blocks that are read: sparsity .9 and .95."""
    samples: int = 96
    batch_size: int = 8
    steps: int = 12
    """Steps of the sampler, as the demo samples."""
    max_train_steps: int = 160
    regression_steps: int = 40
    longer_steps: tuple[int, ...] = (640,)
    """Steps of further runs of the recipe at the first `topk`, which show what more training brings. Their time is
    counted by itself."""
    recipe: str = RECIPE
    """Name or path of the recipe."""
    data: Path | None = None
    """Folder that `dit-accel precompute` wrote. Default: samples of the dense model from the prompts of the recipe."""
    work: Path | None = None
    """Folder of the runs and of scores of single samples, so that a stopped benchmark goes on. Default: beside the
    output."""

    def run(self) -> None:
        """Train, sample, and write what remains to be done; print the table.

        Raises:
            ValueError: the folder of the runs was made with other settings.
        """
        work = self.work or self.output.with_suffix(".work")
        work.mkdir(parents=True, exist_ok=True)
        self._check(work)
        known = work / "scores.json"
        scores: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
        table = [
            row
            for topk in self.topk
            for row in rows_of(topk, self.max_train_steps, self.regression_steps)
        ]
        longer = [learned(self.topk[0], steps) for steps in self.longer_steps]
        data = self.data or work / "data" / TEACHER_FOLDER
        if self.data is None:
            action = functools.partial(teacher_samples, self.recipe, data.parent)
            _once(scores, "teacher samples", known, action)
        subject = Subject("tiny-wan", FIRST_SEED + self.samples)
        subject.set_solver("unipc")
        for rows in (table, longer):  # first what the table needs
            for row in tqdm(rows, desc="training"):
                if row.options is not None:
                    config = config_of(row, work / row.key, data, self.recipe)
                    _once(scores, f"train {row.key}", known, functools.partial(finetune, config))
            for start in tqdm(range(0, self.samples, self.batch_size), desc="batches"):
                batch = range(start, min(start + self.batch_size, self.samples))
                missing = [x for x in rows if str(batch[-1]) not in scores.get(x.key, {})]
                if missing:
                    self._add(subject, batch, missing, scores, work)
                    write_json(known, scores)
        report = self.report(scores, table, longer) | {"training_samples": _count(data)}
        write_json(self.output, report)
        print_table(report)

    def _check(self, work: Path) -> None:
        """Refuse a folder with results of other settings; note those of a new one."""
        names = ("samples", "batch_size", "steps", "max_train_steps", "regression_steps", "recipe")
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        settings["data"] = None
        if self.data is not None:
            settings["data"] = hashlib.sha256((self.data / MANIFEST).read_bytes()).hexdigest()
        path = work / "settings.json"
        if not path.exists():
            write_json(path, settings)
        for name, value in json.loads(path.read_text()).items():
            if settings[name] != value:
                raise ValueError(
                    f"{name}={settings[name]!r}: {work} has results with {value!r}; accepted is that, or another work folder"
                )

    def _add(
        self, subject: Subject, batch: range, rows: list[Row], scores: dict[str, Any], work: Path
    ) -> None:
        """Score the samples of a batch, dense and with each row."""
        seeds = range(FIRST_SEED + batch.start, FIRST_SEED + batch.stop)

        def sampled(key: str, sla: Any) -> torch.Tensor:
            entry = scores.setdefault(key, {})
            with _timed(entry):
                latents, report = subject.latents(seeds, self.steps, sla=sla)
            if report is not None:
                entry["density"] = report.density
            return latents

        kept = work / f"dense-{batch.start}-{batch.stop}.safetensors"
        if not kept.exists():
            with atomic_path(kept) as staging:
                save_file({"latents": sampled("dense", None)}, staging)
        dense = load_file(kept)["latents"]
        results = {"dense": dense}
        for row in rows:
            results[row.key] = sampled(row.key, settings_of(row, work, self.recipe))
        for key, latents in results.items():
            for i, values in zip(batch, subject.score(latents, dense, seeds), strict=True):
                scores[key][str(i)] = values

    def report(self, scores: dict[str, Any], table: list[Row], longer: list[Row]) -> dict[str, Any]:
        """Return means and paired differences with intervals, and what training and sampling took."""

        def column(key: str) -> np.ndarray:
            return np.array([scores[key][str(i)] for i in range(self.samples)])

        latent = METRICS.index("latent_error")
        records = []
        for row in [*table, *longer]:
            values = column(row.key)
            record: dict[str, Any] = {
                "name": row.name,
                "topk": row.topk,
                "density": scores[row.key]["density"],
                **{name: mean_interval(values[:, i]) for i, name in enumerate(METRICS)},
            }
            beside = {name: Row(name, row.topk).key for name in (UNTUNED, RIVAL)}
            if row.options is not None:
                gap = column(beside[UNTUNED])[:, latent]
                record["options"] = row.options
                record["gap_closed"] = closed(gap, values[:, latent])
                difference = values[:, latent] - column(beside[RIVAL])[:, latent]
                record["error_minus_rival"] = mean_interval(difference)
                taken = scores[f"train {row.key}"]
                record["training"] = {name: taken[name] for name in ("seconds", "cpu_seconds")}
            records.append(record)
        keys = ("{}", "train {}")
        extra = [scores[key.format(row.key)] for row in longer for key in keys]
        own = [x for x in scores.values() if all(x is not y for y in extra)]
        return {
            "format_version": FORMAT_VERSION,
            "model": "tiny-wan",
            "recipe": Path(self.recipe).stem,
            "samples": self.samples,
            "first_seed": FIRST_SEED,
            "reference": f"dense attention of the untrained model, UniPC, {self.steps} steps, the same noise",
            "dense_right": mean_interval(column("dense")[:, METRICS.index("right")]),
            "rows": records,
            "minutes": sum(x["seconds"] for x in own) / 60,
            "cpu_minutes": sum(x["cpu_seconds"] for x in own) / 60,
            "longer_cpu_minutes": sum(x["cpu_seconds"] for x in extra) / 60,
            "versions": versions(),
            "machine": machine(),
        }


def closed(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Return the share of the mean error `before` that is gone `after`, with a 95 % bootstrap interval over samples."""

    def share(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
        return 1 - y.mean(axis) / x.mean(axis)

    generator = np.random.default_rng(0)
    found = bootstrap(
        (before, after), share, paired=True, n_resamples=DRAWS, method="percentile", rng=generator
    )
    low, high = found.confidence_interval
    return {"mean": float(share(before, after)), "interval_95": [float(low), float(high)]}


def config_of(row: Row, folder: Path, data: Path | None, recipe: str = RECIPE) -> FinetuneConfig:
    """Return the options of a run.

    Args:
        row: what is trained.
        folder: output folder.
        data: folder of latents; None: samples are made from the prompts of the recipe.
        recipe: name or path.
    """
    options = {
        **(UNTRAINED if row.options is None else row.options),
        "output_dir": str(folder),
        "sla": {**row.sla, "topk": row.topk},
    }
    if data is not None:
        # A run that was stopped goes on.
        options |= {"precomputed_dir": str(data), "resume_from_checkpoint": "latest"}
    return load_config(recipe, options)


def teacher_samples(recipe: str, folder: Path) -> None:
    """Sample the training data of the recipe from the dense model, into `TEACHER_FOLDER` below a folder."""
    config = load_config(recipe, {"output_dir": str(folder)})
    trainable = trainable_of(
        load_model(config, torch.device("cpu")), max_sequence_length=config.max_sequence_length
    )
    open_samples(config, trainable)


def _count(data: Path) -> int:
    """Return the number of samples in a folder of latents."""
    contents = read_manifest(data)
    assert contents is not None
    return len(contents.samples)


def settings_of(row: Row, work: Path, recipe: str) -> Any:
    """Return what `enable` takes: settings, or the folder of the trained result."""
    if row.options is not None:
        return str(work / row.key)
    return config_of(row, work, None, recipe).sla_config


@contextlib.contextmanager
def _timed(entry: dict[str, Any]) -> Iterator[None]:
    """Add what the block takes to `seconds` and `cpu_seconds` of an entry."""
    began, spent = time.perf_counter(), time.process_time()
    yield
    entry["seconds"] = entry.get("seconds", 0.0) + time.perf_counter() - began
    entry["cpu_seconds"] = entry.get("cpu_seconds", 0.0) + time.process_time() - spent


def _once(scores: dict[str, Any], key: str, known: Path, action: Callable[[], Any]) -> None:
    """Run an action unless it is finished; note in the file what it took."""
    if key not in scores:
        entry: dict[str, Any] = {}
        with _timed(entry):
            action()
        scores[key] = entry
        write_json(known, scores)


def print_table(report: dict[str, Any]) -> None:
    """Print one line for each row, as Markdown."""

    def interval(x: dict[str, Any], digits: str) -> str:
        low, high = x["interval_95"]
        return f"{x['mean']:{digits}} [{low:{digits}}, {high:{digits}}]"

    print(
        f"\n{report['model']}, trained on {report['training_samples']} clips; {report['samples']} samples from seed "
        f"{report['first_seed']} on, against "
        f"{report['reference']}; judge of dense samples: {interval(report['dense_right'], '.2f')}; "
        f"{report['cpu_minutes']:.0f} CPU minutes, and {report['longer_cpu_minutes']:.0f} for longer runs\n"
    )
    head = (
        *(
            "topk",
            "",
            "density",
            "latent error",
            "gap closed",
            "error minus shared_softmax, untuned",
        ),
        *("PSNR, dB", "SSIM", "judge", "training, CPU min"),
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for x in report["rows"]:
        trained = "training" in x
        line = [
            f"{x['topk']:g}",
            x["name"],
            f"{x['density']:.3f}",
            interval(x["latent_error"], ".3f"),
        ]
        line.append(interval(x["gap_closed"], ".2f") if trained else "")
        line.append(interval(x["error_minus_rival"], "+.3f") if trained else "")
        line += [interval(x["psnr_db"], ".1f"), f"{x['ssim']['mean']:.3f}"]
        line.append(f"{x['right']['mean']:.2f}")
        line.append(f"{x['training']['cpu_seconds'] / 60:.1f}" if trained else "")
        print(f"| {' | '.join(line)} |")
