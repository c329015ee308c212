"""Benchmark of the quality of region-adaptive sampling, fewer steps and step caches at equal cost (pipelines/bench_ras.py)."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from dit_accel.bench.subjects import METRICS, Subject, mean_interval
from dit_accel.config import RASConfig
from dit_accel.environment import machine, versions
from dit_accel.eval.runs.caches import CACHES
from dit_accel.eval.runs.match import Probes, counted_cost, match_cost
from dit_accel.files import write_json
from dit_accel.sampling.step_caches import step_cache

FORMAT_VERSION = 2
FINE_STEPS = 100
TOLERANCE_TRIALS = 8
"""Number of trials in the search for a tolerance that costs the budget."""
SOLVERS = ("unipc", "euler", "dpm++", "heun")
REFERENCES = {
    "plain": "dense sampling, the same solver and number of steps, the same noise",
    "fine": f"dense sampling, UniPC, {FINE_STEPS} steps, the same noise",
}
RIVALS = ("sea_cache", "first_block_cache", "taylorseer", "mag_cache")
OURS, FEWER = "forecast", "fewer steps"
ON_ONE_SCHEDULE = {
    f"partial, by {kind}": {"ratio": 0.5, "selection": kind} for kind in ("age", "error")
}
"""Rows with the same dense steps and two selections of tokens."""
VARIANTS: dict[str, dict[str, Any]] = {
    "forecast, no correction": {"correction": 0},
    "forecast, undamped": {"predictor": "linear"},
    "forecast and partial": {"ratio": 0.5},
}
"""Rows that change the settings of `OURS`."""
CONTROLLED: dict[str, dict[str, Any]] = {
    "error control": {},
    "error control, tokens": {"ratio": 0.5},
}
"""Rows with `control`, at the tolerance at which other samples cost the budget."""


@dataclass(frozen=True)
class Setting:
    """A solver, a number of steps and a budget."""

    solver: str
    steps: int
    budget: float

    @property
    def key(self) -> str:
        return f"{self.solver} {self.steps} {self.budget:g}"

    @classmethod
    def of(cls, key: str) -> "Setting":
        solver, steps, budget = key.split()
        return cls(solver, int(steps), float(budget))


@dataclass
class Quality:
    """Quality at equal cost against two references, with paired seeds."""

    output: Path
    model: str = "tiny-wan"
    """Model: tiny-wan, tiny-sd3, tiny-lumina2, or a folder."""
    first: int = 96
    """Index of the first sample. No default was tuned on samples from 96 on."""
    samples: int = 32
    prompts: int = 160
    """Number of prompts. Sample i has prompt i and seed i."""
    solvers: tuple[str, ...] = SOLVERS[:3]
    steps: tuple[int, ...] = (12, 20, 28, 50)
    budgets: tuple[float, ...] = ()
    """Shares of the dense cost. Default: that of the preset "balanced" for each number of steps."""
    rivals: tuple[str, ...] = RIVALS
    variants: tuple[str, ...] = ("partial", *VARIANTS, *CONTROLLED)
    """Additional rows: names in `VARIANTS` and `CONTROLLED`, and "partial" for the rows of `ON_ONE_SCHEDULE`."""
    work: Path | None = None
    """Folder of the references and of the scores of single samples, from which a stopped run resumes. Default: next to the
    output."""
    threads: int = 1
    _scores: dict[str, Any] = field(default_factory=dict, init=False)

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._scores_path.exists():
            self._scores.update(json.loads(self._scores_path.read_text()))
            self._check_kept()
        subject = Subject(self.model, self.prompts)
        settings = list(self._settings())
        bar = tqdm(settings, desc=Path(self.model).name)
        for setting in bar:
            bar.set_postfix_str(setting.key)
            self._measure(subject, setting)
            write_json(self.output, self._report(subject))
        print_tables(json.loads(self.output.read_text()))

    def _check_kept(self) -> None:
        """Raise ValueError if the work folder has scores of another number of samples."""
        kept = [row for scores in self._scores.values() for row in scores.values()]
        if any(len(row["plain"]) != self.samples for row in kept):
            raise ValueError(
                f"work={self._folder}: has scores of another number of samples than samples={self.samples}; accepted is "
                "an empty folder, or that of a stopped run with the same number"
            )

    @property
    def _folder(self) -> Path:
        return self.work or self.output.with_suffix(".work")

    @property
    def _scores_path(self) -> Path:
        return self._folder / "scores.json"

    @property
    def _rows(self) -> range:
        return range(self.first, self.first + self.samples)

    def _settings(self) -> Iterable[Setting]:
        preset = RASConfig.load("balanced")
        for steps in self.steps:
            for budget in self.budgets or (preset.budget_of(steps),):
                for solver in self.solvers:
                    yield Setting(solver, steps, budget)

    def _measure(self, subject: Subject, setting: Setting) -> None:
        scores = self._scores.setdefault(setting.key, {})
        missing = [name for name in self._names() if name not in scores]
        if not missing:
            return
        references = {
            "plain": subject.decoded(self._sample(subject, setting, setting.steps)),
            "fine": subject.decoded(self._fine(subject)),
        }
        for name in missing:
            found = self._make(subject, setting, name)
            if found is None:
                continue
            latents, cost, more = found
            record: dict[str, Any] = {"cost": cost, **more}
            decoded = subject.decoded(latents)
            for reference, truth in references.items():
                record[reference] = subject.compare(decoded, truth, self._rows)
            scores[name] = record
            write_json(self._scores_path, self._scores)

    def _names(self) -> list[str]:
        names = ["dense", FEWER, OURS, *self.rivals]
        for variant in self.variants:
            names += ON_ONE_SCHEDULE if variant == "partial" else [variant]
        return names

    def _make(
        self, subject: Subject, setting: Setting, name: str
    ) -> tuple[torch.Tensor, float, dict[str, Any]] | None:
        """Return latents, their cost in dense steps, and further entries of the row; None for a cache that fails."""
        steps, calls = setting.steps, self._calls(subject, setting)
        budget = math.floor(setting.budget * calls + 1e-6) / calls
        if name == "dense":
            return self._sample(subject, setting, steps), float(calls), {}
        if name == FEWER:
            fewer = math.ceil(budget * steps - 1e-6)
            return self._sample(subject, setting, fewer), budget * calls, {"steps_taken": fewer}
        if name in CACHES:
            return self._cached(subject, setting, name, budget)
        if name in CONTROLLED:
            ras = {**CONTROLLED[name], "control": self._tolerance(subject, setting, name)}
            # One sample at a time, because the cost of a sample depends on its errors.
            latents, cost = self._accelerated(subject, setting, ras, self._rows, 1)
            return latents, cost, {"ras": ras}
        ras = ON_ONE_SCHEDULE.get(name) or {
            "budget": setting.budget,
            **({} if name == OURS else VARIANTS[name]),
        }
        latents, cost = self._accelerated(subject, setting, ras, self._rows, 8)
        return latents, cost, {"ras": ras}

    def _accelerated(
        self, subject: Subject, setting: Setting, ras: dict[str, Any], rows: range, size: int
    ) -> tuple[torch.Tensor, float]:
        """Return latents and their cost in dense steps, the mean over batches of `size` samples."""
        latents, costs = [], []
        for some in _chunks(rows, size):
            subject.set_solver(setting.solver)
            made, report = subject.latents(some, setting.steps, ras=ras)
            assert report is not None
            assert report.ras is not None
            latents.append(made)
            costs.append(report.ras.cost)
        return torch.cat(latents), float(np.mean(costs))

    def _tolerance(self, subject: Subject, setting: Setting, name: str) -> float:
        """Return the smallest tolerance at which samples outside the comparison cost at most the budget."""
        low, high = 1e-4, 1.0
        for _ in range(TOLERANCE_TRIALS):
            middle = math.sqrt(low * high)
            ras = {**CONTROLLED[name], "control": middle}
            cost = self._accelerated(subject, setting, ras, range(4), 1)[1]
            low, high = (low, middle) if cost <= setting.budget * setting.steps else (middle, high)
        return float(f"{high:.3g}")

    def _calls(self, subject: Subject, setting: Setting) -> int:
        subject.set_solver(setting.solver)
        subject.pipe.scheduler.set_timesteps(setting.steps)
        return len(subject.pipe.scheduler.timesteps)

    def _cached(
        self, subject: Subject, setting: Setting, name: str, budget: float
    ) -> tuple[torch.Tensor, float, dict[str, Any]] | None:
        cache = CACHES[name]
        if cache.why_not(subject.pipe) is not None:
            return None
        subject.set_solver(setting.solver)

        def sample(rows: range) -> torch.Tensor:
            return subject.latents(rows, setting.steps)[0]

        # Costs are counted on samples outside the comparison.
        match = match_cost(Probes(subject.pipe, sample, range(2)), cache, budget)
        latents: list[torch.Tensor] = []
        ran, first = 0, range(self.first, self.first + 1)
        full = counted_cost(subject.pipe, lambda: sample(first))
        for i in self._rows:
            with step_cache(subject.pipe, match.config):
                ran += counted_cost(
                    subject.pipe,
                    lambda i=i: latents.append(sample(range(i, i + 1))),  # type: ignore[misc]
                )
        share = ran / (full * self.samples)
        return (
            torch.cat(latents),
            share * self._calls(subject, setting),
            {"value": match.value, "stage": match.stage, "note": match.note},
        )

    def _sample(self, subject: Subject, setting: Setting, steps: int) -> torch.Tensor:
        subject.set_solver(setting.solver)
        return torch.cat([subject.latents(rows, steps)[0] for rows in _chunks(self._rows, 8)])

    def _fine(self, subject: Subject) -> torch.Tensor:
        from safetensors.torch import load_file, save_file

        path = self._folder / "fine.safetensors"
        if not path.exists():
            fine = Setting("unipc", FINE_STEPS, 1.0)
            latents = self._sample(subject, fine, FINE_STEPS)
            save_file({"latents": latents.contiguous()}, path)
        return load_file(path)["latents"]

    def _report(self, subject: Subject) -> dict[str, Any]:
        """Return the report of all rows with scores, including those from before a stop."""
        rows = []
        known = {Setting.of(key): scores for key, scores in self._scores.items()}
        for setting in sorted(known, key=lambda x: (x.steps, x.budget, SOLVERS.index(x.solver))):
            scores = known[setting]
            caches = [name for name in CACHES if name in scores]
            best = max(caches, key=lambda x: _psnr(scores[x]).mean(), default=None)
            for name, record in sorted(scores.items(), key=lambda x: _place(x[0])):
                row: dict[str, Any] = {
                    "solver": setting.solver,
                    "steps": setting.steps,
                    "budget": setting.budget,
                    "kind": name,
                    **{k: x for k, x in record.items() if k not in REFERENCES},
                }
                for reference in REFERENCES:
                    values = np.array(record[reference])
                    row[reference] = {m: mean_interval(values[:, i]) for i, m in enumerate(METRICS)}
                    if name == OURS:
                        others = {FEWER: FEWER, "best_cache": best, **dict.fromkeys(scores)}
                        row[f"{reference}_minus"] = {
                            other: mean_interval(
                                _column(record, reference)
                                - _column(scores[key or other], reference)
                            )
                            for other, key in others.items()
                            if (key or other) in scores and (key or other) not in (OURS, "dense")
                        }
                if name == OURS:
                    row["best_cache"] = best
                    if best is not None:
                        row["mean_minus_best_cache"] = mean_interval(
                            _psnr(record) - _psnr(scores[best])
                        )
                rows.append(row)
        return {
            "format_version": FORMAT_VERSION,
            "model": Path(self.model).name,
            "first": self.first,
            "samples": self.samples,
            "references": REFERENCES,
            "sampling": subject.sampling,
            "rows": rows,
            "versions": versions(),
            "machine": machine(),
        }


def _place(name: str) -> int:
    """Return the sort key of a row in its table."""
    order = ["dense", FEWER, OURS, *CACHES, *ON_ONE_SCHEDULE, *VARIANTS, *CONTROLLED]
    return order.index(name)


def _chunks(rows: range, size: int) -> list[range]:
    return [range(a, min(a + size, rows.stop)) for a in range(rows.start, rows.stop, size)]


def _column(record: dict[str, Any], reference: str) -> np.ndarray:
    """Return the PSNR of each sample to one reference."""
    return np.array(record[reference])[:, METRICS.index("psnr_db")]


def _psnr(record: dict[str, Any]) -> np.ndarray:
    """Return the PSNR of each sample, mean over both references."""
    return (_column(record, "plain") + _column(record, "fine")) / 2


@dataclass
class Tables:
    """Print result files as Markdown: one table over all files, or all rows of each file."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    full: bool = False
    """Print all rows, in a table for each solver and number of steps."""
    short: bool = False
    """Print means only, those of both references in one cell."""
    solvers: tuple[str, ...] = SOLVERS
    """Solvers whose rows are printed."""

    def run(self) -> None:
        reports = [json.loads(x.read_text()) for x in self.results]
        for report in reports:
            report["rows"] = [x for x in report["rows"] if x["solver"] in self.solvers]
        if self.short:
            print_short(reports)
        elif self.full:
            for report in reports:
                print_tables(report)
        else:
            print_overview(reports)


def print_overview(reports: list[dict[str, Any]]) -> None:
    """Print a row for each model, solver and number of steps: ours, fewer steps and the best step cache at equal cost."""
    head = (
        "model, solver, steps",
        "cost",
        "plain: fewer steps",
        "plain: best cache",
        "plain: ours",
        "fine: all steps",
        "fine: fewer steps",
        "fine: best cache",
        "fine: ours",
        "ours minus fewer steps: to plain",
        "to fine",
        "ours minus best cache, mean of both",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for kinds, best, cells in _compared(reports):
        ours = kinds[OURS]
        for reference in REFERENCES:
            shown = [kinds[FEWER], best, ours]
            for x in shown if reference == "plain" else [kinds["dense"], *shown]:
                cells.append("" if x is None else f"{x[reference]['psnr_db']['mean']:.1f}")
        if best is not None:
            cells[3] += f" ({CACHES[best['kind']].shown})"
        cells += [_signed(ours[f"{x}_minus"][FEWER]) for x in REFERENCES]
        mean = ours.get("mean_minus_best_cache")
        cells.append("" if mean is None else _signed(mean))
        print(f"| {' | '.join(cells)} |")


def print_short(reports: list[dict[str, Any]]) -> None:
    """Print a row for each model, solver and number of steps: PSNR to the plain run / to the fine run."""
    head = (
        "model, solver, steps",
        "cost",
        "fewer steps",
        "best step cache of diffusers",
        "ours",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for kinds, best, cells in _compared(reports):
        ours = kinds[OURS]
        cells.append(_pair(kinds[FEWER]))
        cells.append(
            "none for this model"
            if best is None
            else f"{_pair(best)} ({CACHES[best['kind']].shown})"
        )
        cells.append(f"**{_pair(ours)}**")
        print(f"| {' | '.join(cells)} |")


def _compared(
    reports: list[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, list[str]]]:
    """Yield the rows of each setting by kind, the row of the best step cache, and the first two cells of the line."""
    for report in reports:
        for (solver, steps, _), rows in _groups(report).items():
            kinds = {x["kind"]: x for x in rows}
            if OURS in kinds:
                ours = kinds[OURS]
                cells = [f"{report['model']}, {solver} {steps}", f"{ours['cost']:.1f}"]
                yield kinds, kinds.get(ours["best_cache"] or ""), cells


def _pair(row: dict[str, Any]) -> str:
    """Return the PSNR to both references as text."""
    return " / ".join(f"{row[x]['psnr_db']['mean']:.1f}" for x in REFERENCES)


def _groups(report: dict[str, Any]) -> dict[tuple, list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["solver"], row["steps"], row["budget"]), []).append(row)
    return groups


def print_tables(report: dict[str, Any]) -> None:
    """Print a table for each number of steps: all rows against both references."""
    print(
        f"\n{report['model']}, {report['samples']} samples. Plain: {report['references']['plain']}. "
        f"Fine: {report['references']['fine']}."
    )
    head = (
        "way to sample",
        "cost in dense steps",
        "PSNR to plain, dB",
        "SSIM",
        "latent error",
        "PSNR to fine, dB",
        "SSIM",
        "latent error",
        "judged right",
        "ours minus this, to plain",
        "to fine",
    )
    for (solver, steps, budget), rows in _groups(report).items():
        print(f"\n{solver}, {steps} steps, budget {budget:g}\n")
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        ours = next((x for x in rows if x["kind"] == OURS), None)
        for row in rows:
            name = row["kind"]
            cells = [f"**{name}**" if name == OURS else name, f"{row['cost']:.1f}"]
            for reference in REFERENCES:
                own = name == "dense" and reference == "plain"
                for metric, digits in (
                    ("psnr_db", ".1f"),
                    ("ssim", ".4f"),
                    ("latent_error", ".3f"),
                ):
                    cells.append("" if own else format(row[reference][metric]["mean"], digits))
            cells.append(f"{row['fine']['right']['mean']:.2f}")
            for reference in REFERENCES:
                gap = None if ours is None else ours[f"{reference}_minus"].get(name)
                cells.append("" if gap is None else _signed(gap))
            print(f"| {' | '.join(cells)} |")


def _signed(gap: dict[str, Any]) -> str:
    low, high = gap["interval_95"]
    return f"{gap['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"
