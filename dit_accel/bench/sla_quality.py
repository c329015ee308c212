"""Benchmark of the training-free quality of sparse attention on trained models (pipelines/bench_sla.py)."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dit_accel.bench.sla_attention import (
    attention_error,
    noted_calls,
    print_attention,
    top_p_for,
)
from dit_accel.bench.sla_rows import RANDOM, TILES, Row, attention_rows, name_of, sampled_rows
from dit_accel.bench.subjects import METRICS, Subject, mean_interval, random_router
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 1


@dataclass
class Quality:
    """Quality of training-free sparse attention against dense attention with the same seeds."""

    output: Path
    model: str = "tiny-wan"
    """Model: tiny-wan, tiny-sd3, tiny-lumina2, or a folder."""
    samples: int = 96
    batch_size: int = 8
    steps: int = 10
    attention_samples: int = 2
    """Number of samples whose attention calls are compared."""
    work: Path | None = None
    """File of the scores of single samples, from which a stopped run resumes. Default: next to the output."""

    def run(self) -> None:
        work = self.work or self.output.with_suffix(".work.json")
        scores: dict[str, Any] = json.loads(work.read_text()) if work.exists() else {}
        subject = Subject(self.model, self.samples)
        subject.set_solver("unipc")
        kind = "still" if subject.still else "video"
        self._add_attention(subject, kind, scores)
        write_json(work, scores)
        print_attention(scores["attention"], Path(self.model).name)
        top_p = {x["key"]: x.get("top_p") for x in scores["attention"]}
        todo = list(self._todo(scores))
        for rows, missing in tqdm(todo, desc=f"{self.model}, batches"):
            dense, _ = subject.latents(rows, self.steps)
            right = subject.score(dense, dense, rows)
            for i, values in zip(rows, right, strict=True):
                scores.setdefault("dense", {})[str(i)] = values
            for row in missing:
                self._add(subject, row, rows, dense, scores, row.sla(kind, top_p[row.key]))
            write_json(work, scores)
        write_json(self.output, self.report(scores, kind))
        print_table(json.loads(self.output.read_text()))

    def _todo(self, scores: dict[str, Any]) -> Iterator[tuple[range, list[Row]]]:
        for start in range(0, self.samples, self.batch_size):
            rows = range(start, min(start + self.batch_size, self.samples))
            missing = [
                row for row in sampled_rows() if str(rows[-1]) not in scores.get(row.key, {})
            ]
            if missing:
                yield rows, missing

    def _add_attention(self, subject: Subject, kind: str, scores: dict[str, Any]) -> None:
        """Add the missing rows of the comparison of attention outputs."""
        known = {x["key"]: x for x in scores.get("attention", ())}
        missing = [row for row in attention_rows() if row.key not in known]
        if missing:
            calls = {
                order: noted_calls(subject, order, self.steps, self.attention_samples)
                for order in ("raster", *TILES[kind].values())
            }
        top_ps: dict[Any, float] = {}
        for row in tqdm(missing, desc=f"{self.model}, attention"):
            order = "raster" if row.order == "raster" else TILES[kind][row.block]
            top_p, case = None, replace(row, combine="none")
            if row.router == "top-p":
                if case not in top_ps:
                    top_ps[case] = top_p_for(case, kind, calls[order])
                top_p = top_ps[case]
            found = attention_error(row, kind, calls[order], top_p)
            known[row.key] = {"key": row.key, **asdict(row), "top_p": top_p, "measured": found}
        scores["attention"] = [known[row.key] | asdict(row) for row in attention_rows()]

    def _add(
        self,
        subject: Subject,
        row: Row,
        rows: range,
        dense: torch.Tensor,
        scores: dict[str, Any],
        sla: dict[str, Any],
    ) -> None:
        def prepare(methods: Any) -> None:
            if row.router == RANDOM:
                methods["sla"].set_router(random_router(rows.start))

        latents, report = subject.latents(rows, self.steps, sla=sla, prepare=prepare)
        assert report is not None
        entry = scores.setdefault(row.key, {})
        entry["density"] = [report.density, report.overall_density]
        for i, values in zip(rows, subject.score(latents, dense, rows), strict=True):
            entry[str(i)] = values

    def report(self, scores: dict[str, Any], kind: str) -> dict[str, Any]:
        """Return means and paired differences, with intervals."""

        def column(key: str) -> np.ndarray:
            return np.array([scores[key][str(i)] for i in range(self.samples)])

        def differences(a: str, b: str) -> dict[str, Any]:
            gap = column(a) - column(b)
            return {name: mean_interval(gap[:, i]) for i, name in enumerate(METRICS)}

        rows = []
        for row in sampled_rows():
            values = column(row.key)
            density, overall = scores[row.key]["density"]
            record = {
                **asdict(row),
                "order": "raster" if row.order == "raster" else list(TILES[kind][row.block]),
                "realised_density": density,
                "overall_density": overall,
                **{name: mean_interval(values[:, i]) for i, name in enumerate(METRICS)},
            }
            if row == Row(row.density, "shared_softmax"):
                record["minus_none"] = differences(row.key, Row(row.density, "none").key)
            if row.key == Row(0.25, "shared_softmax").key:
                other = Row(0.25, "shared_softmax", router=RANDOM).key
                record["minus_random"] = differences(row.key, other)
            if row.ranked_by == "spread":
                record["minus_mean"] = differences(row.key, replace(row, ranked_by="mean").key)
            rows.append(record)
        right = np.array([scores["dense"][str(i)][-1] for i in range(self.samples)])
        return {
            "format_version": FORMAT_VERSION,
            "model": Path(self.model).name,
            "samples": self.samples,
            "reference": f"dense, UniPC, {self.steps} steps, the same noise",
            "dense_right": mean_interval(right),
            "rows": rows,
            "attention": scores["attention"],
            "versions": versions(),
            "machine": machine(),
        }


def print_table(report: dict[str, Any]) -> None:
    """Print a line for each row with samples."""

    def interval(x: dict[str, Any], digits: str) -> str:
        low, high = x["interval_95"]
        return f"{x['mean']:{digits}} [{low:{digits}}, {high:{digits}}]"

    right = interval(report["dense_right"], ".2f")
    print(
        f"\n{report['model']}, {report['samples']} samples, against {report['reference']} (judge {right})"
    )
    head = (
        *("topk", "density", "blocks", "order", "chosen by", "combine", "PSNR, dB", "SSIM"),
        "latent error",
        "judge",
        "PSNR minus none",
        "minus random plan",
        "minus mean router",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for x in report["rows"]:
        order = x["order"] if x["order"] == "raster" else "x".join(map(str, x["order"]))
        line = [f"{x['density']}", f"{x['realised_density']:.3f}", str(x["block"]), order]
        line += [name_of(x), x["combine"], interval(x["psnr_db"], ".1f")]
        line += [f"{x['ssim']['mean']:.4f}", f"{x['latent_error']['mean']:.3f}"]
        line.append(f"{x['right']['mean']:.2f}")
        for name in ("minus_none", "minus_random", "minus_mean"):
            line.append(interval(x[name]["psnr_db"], "+.2f") if name in x else "")
        print(f"| {' | '.join(line)} |")
