"""Benchmark of forecast schedules that are learned on a few samples and tested on others (pipelines/bench_ras.py)."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dit_accel.bench.ras_quality import FINE_STEPS, REFERENCES
from dit_accel.bench.subjects import METRICS, Subject, mean_interval
from dit_accel.config import RASConfig
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 1
Decoded = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Learned:
    """Quality of a forecast schedule that is learned by moving single dense steps, against the computed schedule.

    A move is kept if the samples come closer to both references. Other samples are compared. A schedule is passed to
    `RASConfig` as `resets`, so only settings differ.
    """

    output: Path
    model: str = "tiny-sd3"
    """Model: tiny-wan, tiny-sd3, tiny-lumina2, or a folder."""
    solvers: tuple[str, ...] = ("unipc", "euler", "dpm++")
    steps: int = 28
    budget: float | None = None
    """Share of the dense cost. Default: that of the preset "balanced"."""
    learn: int = 8
    """Number of samples to learn from: samples 0 to learn - 1."""
    first: int = 96
    """Index of the first compared sample."""
    samples: int = 32
    prompts: int = 160
    """Number of prompts. Sample i has prompt i and seed i."""
    tries: int = 80
    """Number of schedules to try."""
    threads: int = 1
    _report: Any = field(default=None, init=False)

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        subject = Subject(self.model, self.prompts)
        some, others = range(self.learn), range(self.first, self.first + self.samples)
        fine = {rows: self._sample(subject, "unipc", FINE_STEPS, rows) for rows in (some, others)}
        found = []
        for solver in self.solvers:
            plain = {rows: self._sample(subject, solver, self.steps, rows) for rows in fine}
            references = {rows: (plain[rows], fine[rows]) for rows in fine}
            found.append(self._learn(subject, solver, some, others, references))
            record = {"format_version": FORMAT_VERSION, "model": Path(self.model).name}
            record |= {"steps": self.steps, "learned_from": self.learn, "first": self.first}
            record |= {"samples": self.samples, "references": REFERENCES, "rows": found}
            write_json(self.output, record | {"versions": versions(), "machine": machine()})
        print_table(found)

    def _learn(
        self,
        subject: Subject,
        solver: str,
        some: range,
        others: range,
        references: dict[range, tuple[Decoded, Decoded]],
    ) -> dict[str, Any]:
        budget = self.budget or RASConfig.load("balanced").budget_of(self.steps)
        settings: dict[str, Any] = {"budget": budget}
        before = self._scores(subject, solver, settings, some, references[some])
        assert self._report is not None
        dense = {x.step for x in self._report.ras.steps if x.mode == "dense"}
        start, best, value = set(dense), dense, before.mean()
        seen, generator = {frozenset(dense)}, random.Random(0)
        for _ in tqdm(range(self.tries), desc=f"{Path(self.model).name}, {solver}"):
            run = generator.choice(sorted(set(range(self.steps)) - best))
            left = [k for k in best if 1 < k < self.steps - 1]
            # Half of the moves are by one step.
            near = [k for k in left if abs(k - run) == 1] if generator.random() < 0.5 else left
            if not near:
                continue
            changed = best - {generator.choice(sorted(near))} | {run}
            if frozenset(changed) in seen:
                continue
            seen.add(frozenset(changed))
            kinds = {**settings, **_as_resets(changed)}
            scores = self._scores(subject, solver, kinds, some, references[some])
            if scores.mean() > value:
                best, value = changed, scores.mean()
        row: dict[str, Any] = {"solver": solver, "budget": budget, "cost": len(best)}
        made = {}
        for name, steps in (("computed", start), ("learned", best)):
            row[f"{name}_steps"] = sorted(steps)
            kinds = {**settings, **_as_resets(steps)}
            made[name] = self._scores(subject, solver, kinds, others, references[others])
            for i, reference in enumerate(REFERENCES):
                row[f"{name}_{reference}"] = mean_interval(made[name][i])
        for i, reference in enumerate(REFERENCES):
            row[f"gain_{reference}"] = mean_interval(made["learned"][i] - made["computed"][i])
        return row

    def _scores(
        self,
        subject: Subject,
        solver: str,
        ras: dict[str, Any],
        rows: range,
        references: tuple[Decoded, Decoded],
    ) -> np.ndarray:
        """Return the PSNR of each sample to both references, `[2, N]`."""
        latents = []
        for start in range(rows.start, rows.stop, 8):
            subject.set_solver(solver)
            some = range(start, min(start + 8, rows.stop))
            made, self._report = subject.latents(some, self.steps, ras=ras)
            latents.append(made)
        decoded = subject.decoded(torch.cat(latents))
        column = METRICS.index("psnr_db")
        return np.array(
            [[x[column] for x in subject.compare(decoded, truth, rows)] for truth in references]
        )

    def _sample(self, subject: Subject, solver: str, steps: int, rows: range) -> Decoded:
        latents = []
        for start in range(rows.start, rows.stop, 8):
            subject.set_solver(solver)
            latents.append(subject.latents(range(start, min(start + 8, rows.stop)), steps)[0])
        return subject.decoded(torch.cat(latents))


def _as_resets(dense: set[int]) -> dict[str, Any]:
    """Return settings with exactly these dense steps: they use up the budget."""
    return {"warmup": 1, "tail": 0, "resets": tuple(sorted(dense - {0}))}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line for each solver."""
    print("\n| solver | steps that run | PSNR to plain / to fine, dB | gain to plain | to fine |")
    print("|---|---|---|---|---|")
    for row in rows:
        for name in ("computed", "learned"):
            steps = set(row[f"{name}_steps"])
            shown = "".join("#" if k in steps else "-" for k in range(max(steps) + 1))
            means = [f"{row[f'{name}_{x}']['mean']:.1f}" for x in REFERENCES]
            gains = ["", ""]
            if name == "learned":
                for i, x in enumerate(REFERENCES):
                    low, high = row[f"gain_{x}"]["interval_95"]
                    gains[i] = f"{row[f'gain_{x}']['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"
            print(
                f"| {row['solver']}, {name} | `{shown}` | {' / '.join(means)} | {' | '.join(gains)} |"
            )
