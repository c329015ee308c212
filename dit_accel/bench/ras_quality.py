"""Paired quality of region-adaptive sampling on trained models (part of bench_ras.py)."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dit_accel.bench.subjects import METRICS, Subject, mean_interval
from dit_accel.config import RASConfig
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 1
REFERENCE_STEPS = 100
OURS = ("ours, K/V held", "ours, K/V linear")
HOLD = {"predictor": "hold", "kv_predictor": "hold"}
DENSE_STEPS = {"warmup": 0.15, "tail": 1, "resets": (0.43, 0.71)}
"""Settings of the rows that choose tokens in other ways than ours; the published ones of 28 and 30 steps are those of the
preset "paper"."""


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
            # What the paper's choice of tokens is worth: the same dense steps, tiles at random.
            "random tokens, held": {"selection": "random", **DENSE_STEPS, **HOLD},
            "paper": RASConfig.PRESETS["paper"] | DENSE_STEPS,
            OURS[0]: {"kv_predictor": "hold"},
            OURS[1]: {"kv_predictor": "linear"},
        }
        rows += [Row(k, solver, steps, ratio, {**ras, "ratio": ratio}) for k, ras in ways.items()]
        rows.append(Row("dense, equal cost", solver, steps, ratio))
    return rows


@dataclass
class Quality:
    """Paired quality of every way to spare, against dense sampling at equal cost."""

    output: Path
    model: str = "tiny-wan"
    """tiny-wan, tiny-sd3, tiny-lumina2, or a folder."""
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
            reference, _ = subject.latents(rows, REFERENCE_STEPS)
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
            steps = math.ceil(scores[ours.key]["cost"])
        latents, report = subject.latents(rows, steps, ras=row.ras)
        cost = float(steps) if report is None or report.ras is None else report.ras.cost
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


TABLES = {
    "psnr_db": ("PSNR, dB", ".1f"),
    "latent_error": ("relative latent error", ".3f"),
    "ssim": ("SSIM", ".4f"),
    "right": ("share that the judge finds right", ".2f"),
}
COLUMNS = ("dense, equal cost", "random tokens, held", "paper", *OURS)


def print_table(report: dict[str, Any]) -> None:
    """A table of each metric, a row for each solver, number of steps and ratio."""
    cells = {(x["solver"], x["steps"], x["ratio"], x["kind"]): x for x in report["rows"]}
    for metric, (title, digits) in TABLES.items():
        print(
            f"\n{report['model']}, {report['samples']} samples: {title}, against {report['reference']}"
        )
        gaps = (
            tuple(f"{kind[6:]}, minus equal cost" for kind in OURS) if metric == "psnr_db" else ()
        )
        head = ("solver, steps", "ratio", "cost", "dense", *COLUMNS, *gaps)
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for solver, steps, ratio in dict.fromkeys(key[:3] for key in cells if key[2]):
            of = {kind: cells[solver, steps, ratio, kind] for kind in COLUMNS}
            values = [cells[solver, steps, None, "dense"], *of.values()]
            line = [f"{solver} {steps}", f"{ratio}", f"{of[OURS[0]]['cost']:.1f}"]
            line += [format(x[metric]["mean"], digits) for x in values]
            line[4] += f" ({of[COLUMNS[0]]['cost']:.0f} steps)"
            for kind in OURS if gaps else ():
                gap = of[kind]["minus_equal_cost"][metric]
                low, high = gap["interval_95"]
                line.append(f"{gap['mean']:+.2f} [{low:+.2f}, {high:+.2f}]")
            print(f"| {' | '.join(line)} |")
