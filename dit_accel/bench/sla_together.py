"""Benchmark of the quality of sparse attention, region-adaptive sampling, and both together (pipelines/bench_sla.py)."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dit_accel.bench.sla_rows import Row
from dit_accel.bench.subjects import METRICS, Subject, mean_interval
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.environment import machine, versions
from dit_accel.files import write_json

FORMAT_VERSION = 1


@dataclass
class Together:
    """Quality of both methods, alone and together, against dense sampling with the same steps and seeds."""

    output: Path
    model: str = "tiny-wan"
    """Model: tiny-wan, tiny-sd3, tiny-lumina2, or a folder."""
    samples: int = 96
    batch_size: int = 8
    steps: int = 20
    topk: float = 0.25
    block: int = 32
    ratio: float | None = None
    """Share of the tokens in partial steps. Default: the budget of the preset."""
    few_step: bool = False
    """Use the presets "few-step" instead of "balanced". Also measure "balanced" at this number of steps, and dense sampling
    with fewer steps at the cost of region-adaptive sampling."""
    work: Path | None = None
    """File of the scores of single samples, from which a stopped run resumes. Default: next to the output."""

    def run(self) -> None:
        work = self.work or self.output.with_suffix(".work.json")
        scores: dict[str, Any] = json.loads(work.read_text()) if work.exists() else {}
        subject = Subject(self.model, self.samples)
        subject.set_solver("unipc")
        row = Row(self.topk, "shared_softmax", self.block, ranked_by="spread")
        sla = row.sla("still" if subject.still else "video", None)
        # Without a ratio: the budget of the preset "balanced".
        ras: dict[str, Any] = {} if self.ratio is None else {"ratio": self.ratio}
        kinds: dict[str, dict[str, Any]] = {}
        if self.few_step:
            ras |= RASConfig.PRESETS["few-step"]
            kinds["fewer dense steps"] = {"steps": math.floor(ras["budget"] * self.steps)}
            kinds["sparse attention, balanced"] = {"sla": sla}
            sla = sla | SLAConfig.PRESETS["few-step"]
        kinds |= {
            "sparse attention": {"sla": sla},
            "region-adaptive": {"ras": ras},
            "both": {"sla": sla, "ras": ras},
        }
        for start in tqdm(range(0, self.samples, self.batch_size), desc=f"{self.model}, batches"):
            rows = range(start, min(start + self.batch_size, self.samples))
            if str(rows[-1]) in scores.get("both", {}):
                continue
            dense, _ = subject.latents(rows, self.steps)
            self._note(scores, "dense", rows, subject.score(dense, dense, rows))
            for kind, acceleration in kinds.items():
                latents, report = subject.latents(rows, **{"steps": self.steps} | acceleration)
                self._note(scores, kind, rows, subject.score(latents, dense, rows))
                if report is None:
                    scores[kind]["cost"] = acceleration["steps"]
                    continue
                scores[kind]["density"] = report.overall_density
                scores[kind]["cost"] = None if report.ras is None else report.ras.cost
            write_json(work, scores)
        write_json(self.output, self.report(scores, sla, ras))
        print_table(json.loads(self.output.read_text()))

    @staticmethod
    def _note(scores: dict[str, Any], kind: str, rows: range, values: list) -> None:
        entry = scores.setdefault(kind, {})
        for i, x in zip(rows, values, strict=True):
            entry[str(i)] = x

    def report(
        self, scores: dict[str, Any], sla: dict[str, Any], ras: dict[str, Any]
    ) -> dict[str, Any]:
        """Return means with intervals."""
        rows = []
        for kind, entry in scores.items():
            values = np.array([entry[str(i)] for i in range(self.samples)])
            row = {name: mean_interval(values[:, i]) for i, name in enumerate(METRICS)}
            rows.append(
                {"kind": kind, "density": entry.get("density"), "cost": entry.get("cost"), **row}
            )
        return {
            "format_version": FORMAT_VERSION,
            "model": Path(self.model).name,
            "samples": self.samples,
            "reference": f"dense, UniPC, {self.steps} steps, the same noise",
            "sla": sla,
            "ras": ras,
            "rows": rows,
            "versions": versions(),
            "machine": machine(),
        }


def print_table(report: dict[str, Any]) -> None:
    """Print a line for each kind."""
    print(f"\n{report['model']}, {report['samples']} samples, against {report['reference']}")
    head = (
        "",
        "density of all self-attention",
        "cost of steps",
        "PSNR, dB",
        "SSIM",
        "latent error",
        "judge",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for x in report["rows"]:
        low, high = x["psnr_db"]["interval_95"]
        same = x["kind"] == "dense"
        line = [
            x["kind"],
            "1" if x["density"] is None else f"{x['density']:.3f}",
            "all" if x["cost"] is None else f"{x['cost']:.1f}",
            "" if same else f"{x['psnr_db']['mean']:.1f} [{low:.1f}, {high:.1f}]",
            "" if same else f"{x['ssim']['mean']:.4f}",
            "" if same else f"{x['latent_error']['mean']:.3f}",
            f"{x['right']['mean']:.2f}",
        ]
        print(f"| {' | '.join(line)} |")
