"""Training-free quality of sparse attention on trained models (part of bench_sla.py)."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_subject import METRICS, Subject, mean_interval, random_router
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from dit_accel.config import SLAConfig
from dit_accel.config.sla import CLIP_TILES, IMAGE_TILES
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.kernels import SparsePlan
from dit_accel.sla import SparseLinearAttention

FORMAT_VERSION = 1
DENSITIES = (0.5, 0.25, 0.125, 0.05)
TILES = {
    "video": {block: CLIP_TILES[block] for block in (16, 32, 64)},
    "still": {block: IMAGE_TILES[block] for block in (16, 32, 64)},
}
RANDOM = "random plan"


@dataclass(frozen=True)
class Row:
    """One way to attend."""

    density: float
    """Asked for: the fraction of key blocks that is read."""
    combine: str
    block: int = 32
    order: str = "tiles"
    router: str = "top-k"
    ranked_by: str = "mean"
    """`router` of the settings."""

    @property
    def key(self) -> str:
        spread = " spread" if self.ranked_by == "spread" else ""
        return f"{self.density} {self.combine} {self.block} {self.order} {self.router}{spread}"

    def sla(self, kind: str, top_p: float | None) -> dict[str, Any]:
        """Settings; one dense step and one dense layer, as by default."""
        rule = {"topk": self.density} if self.router != "top-p" else {"topk": None, "top_p": top_p}
        return {
            **rule,
            "router": self.ranked_by,
            "combine": self.combine,
            "block_q": self.block,
            "block_k": self.block,
            "order": "raster" if self.order == "raster" else TILES[kind][self.block],
            "crossover": "never",
        }


def sampled_rows() -> list[Row]:
    """Rows that are sampled with: every density both ways, and at .25 what else matters."""
    rows = [Row(d, combine) for d in DENSITIES for combine in ("none", "shared_softmax")]
    at = {"density": 0.25, "combine": "shared_softmax"}
    rows += [Row(**at, router=RANDOM), Row(**at, router="top-p"), Row(**at, order="raster")]
    rows += [Row(**at, block=16), Row(**at, block=64), Row(**at, block=64, order="raster")]
    rows += [Row(d, "shared_softmax", ranked_by="spread") for d in (0.25, 0.125)]
    return [*rows, Row(**at, block=64, ranked_by="spread")]


def attention_rows() -> list[Row]:
    """Rows whose attention outputs are compared: everything with everything."""
    return [
        Row(density, combine, block, order, router, ranked_by)
        for block in (16, 32, 64)
        for order in ("tiles", "raster")
        for router, ranked_by in (
            ("top-k", "mean"),
            ("top-k", "spread"),
            ("top-p", "mean"),
            (RANDOM, "mean"),
        )
        for density in DENSITIES
        for combine in ("none", "shared_softmax")
    ]


class Noted:
    """Calls of attention layers of a dense run, as the sparse layer would get them."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen = 0
        self.calls: list[tuple[tuple, dict]] = []

    def watch(self, module: SparseLinearAttention) -> None:
        forward = module.forward

        def noting(*qkv: torch.Tensor, **options: Any) -> Any:
            if self.seen % self.every == 0:
                self.calls.append(([x.clone() for x in qkv], options))
            self.seen += 1
            return forward(*qkv, **options)

        module.forward = noting  # type: ignore[method-assign]


def noted_calls(subject: Subject, order: Any, steps: int, samples: int) -> list[tuple[Any, dict]]:
    """Some attention calls of a run that reads everything, in this token order, at every depth."""
    noted = Noted(every=5)  # so that layers and contexts take turns

    def prepare(session: Any) -> None:
        for layer in session.sla.layers.values():
            noted.watch(layer.module)

    block = 16 if order == "raster" else int(np.prod(order))
    sla = {"topk": 1.0, "block_q": block, "block_k": block, "order": order, "crossover": "never"}
    subject.latents(range(samples), steps, sla=sla, prepare=prepare)
    return noted.calls


def layer_of(row: Row, kind: str, call: tuple[Any, dict], top_p: float | None) -> Any:
    q = call[0][0]
    layer = SparseLinearAttention(SLAConfig(**row.sla(kind, top_p)), q.shape[1], q.shape[3])
    if row.router == RANDOM:
        layer.router = random_router(0)
    return layer


def density_of(row: Row, kind: str, calls: list, top_p: float | None) -> float:
    layer = layer_of(row, kind, calls[0], top_p)
    return float(np.mean([float(layer(*qkv, **options)[1]) for qkv, options in calls]))


def top_p_for(row: Row, kind: str, calls: list) -> float:
    """The `top_p` whose mean density is that of `topk` (to a hundredth of it)."""
    target = density_of(Row(row.density, "none", row.block, row.order), kind, calls, None)
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        found = density_of(row, kind, calls, middle)
        if abs(found - target) < 0.01 * target:
            break
        low, high = (middle, high) if found < target else (low, middle)
    return middle


def attention_error(row: Row, kind: str, calls: list, top_p: float | None) -> dict[str, float]:
    """Relative error of attention outputs against dense attention, and the attention mass read."""
    errors, masses, densities = [], [], []
    for call in calls:
        layer = layer_of(row, kind, call, top_p)
        (q, k, v), options = call
        plans: list[SparsePlan] = []
        plan_of = layer._plan
        layer._plan = lambda *args, plan_of=plan_of, plans=plans: (
            plans.append(plan_of(*args)) or plans[-1]
        )
        o, density = layer(q, k, v, **options)
        scale = options.get("scale")
        exact = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        errors.append(float((o - exact).norm() / exact.norm()))
        densities.append(float(density))
        if options.get("text", "none") == "none":
            masses.append(float(plans[0].recall(q, k, scale=scale).mean()))
    result = {"error": float(np.mean(errors)), "density": float(np.mean(densities))}
    return result | ({"recall": float(np.mean(masses))} if masses else {})


@dataclass
class Quality:
    """Paired quality of training-free sparse attention, against dense attention with the same seeds."""

    output: Path
    model: str = "tiny-wan"
    """tiny-wan, tiny-sd3, or a folder."""
    samples: int = 96
    batch_size: int = 8
    steps: int = 10
    attention_samples: int = 2
    """Samples whose attention calls are compared."""
    work: Path | None = None
    """Scores of single samples, kept so that a stopped run goes on. Default: beside the output."""

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
        """The comparison of attention outputs, as far as it is missing."""
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
        def prepare(session: Any) -> None:
            if row.router == RANDOM:
                session.sla.set_router(random_router(rows.start))

        latents, report = subject.latents(rows, self.steps, sla=sla, prepare=prepare)
        assert report is not None
        entry = scores.setdefault(row.key, {})
        entry["density"] = [report.density, report.overall_density]
        for i, values in zip(rows, subject.score(latents, dense, rows), strict=True):
            entry[str(i)] = values

    def report(self, scores: dict[str, Any], kind: str) -> dict[str, Any]:
        """Means, and differences of pairs, with intervals."""

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


def name_of(row: dict[str, Any]) -> str:
    """How blocks are chosen, with the setting `router` where blocks are ranked."""
    return row["router"] if row["router"] == RANDOM else f"{row['router']}, {row['ranked_by']}"


def print_attention(records: list[dict[str, Any]], model: str) -> None:
    """Relative errors of attention outputs, a line for each block, order and router."""
    print(
        f"\n{model}: relative error of attention outputs, none / shared_softmax (share of mass read)"
    )
    head = ("blocks", "order", "chosen by", *(f"{d}" for d in DENSITIES))
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    cells = {
        (x["block"], x["order"], name_of(x), x["density"], x["combine"]): x["measured"]
        for x in records
    }
    for block, order, router in dict.fromkeys(key[:3] for key in cells):
        line = [str(block), order, router]
        for density in DENSITIES:
            none, shared = (
                cells[block, order, router, density, c] for c in ("none", "shared_softmax")
            )
            mass = f" ({none['recall']:.2f})" if "recall" in none else ""
            line.append(f"{none['error']:.3f} / {shared['error']:.3f}{mass}")
        print(f"| {' | '.join(line)} |")


def print_table(report: dict[str, Any]) -> None:
    """One line for each row that was sampled with."""

    def interval(x: dict[str, Any], digits: str) -> str:
        low, high = x["interval_95"]
        return f"{x['mean']:{digits}} [{low:{digits}}, {high:{digits}}]"

    right = interval(report["dense_right"], ".2f")
    print(
        f"\n{report['model']}, {report['samples']} samples, against {report['reference']} (judge {right})"
    )
    head = ("topk", "density", "blocks", "order", "chosen by", "combine", "PSNR, dB", "SSIM")
    head = (
        *head,
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
