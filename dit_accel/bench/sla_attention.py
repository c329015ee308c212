"""Comparison of the outputs of single attention calls, sparse against dense (used by sla_quality.py)."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.bench.sla_rows import DENSITIES, RANDOM, Row, name_of
from dit_accel.bench.subjects import Subject, random_router
from dit_accel.config import SLAConfig
from dit_accel.kernels import SparsePlan
from dit_accel.sla import SparseLinearAttention


class Noted:
    """Recorder of the inputs of attention calls, as sparse layers get them. It keeps every `every`-th call."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen = 0
        self.calls: list[tuple[list[torch.Tensor], dict[str, Any]]] = []

    def watch(self, module: SparseLinearAttention) -> None:
        forward = module.forward

        def noting(*qkv: torch.Tensor, **options: Any) -> Any:
            if self.seen % self.every == 0:
                self.calls.append(([x.clone() for x in qkv], options))
            self.seen += 1
            return forward(*qkv, **options)

        module.forward = noting  # type: ignore[method-assign]


def noted_calls(subject: Subject, order: Any, steps: int, samples: int) -> list[tuple[Any, dict]]:
    """Return some attention calls of a run that reads every block, with the given token order."""
    noted = Noted(every=5)  # 5, so that the kept calls cover all layers and contexts

    def prepare(methods: Any) -> None:
        for layer in methods["sla"].layers.values():
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
    return float(np.mean([with_density(layer, call)[1] for call in calls]))


def with_density(layer: Any, call: tuple[Any, dict]) -> tuple[torch.Tensor, float]:
    """Return the output of a call, and its density: attended (query, key) pairs / all pairs."""
    qkv, options = call
    tally = torch.zeros(3, dtype=torch.int64, device=qkv[0].device)
    o = layer(*qkv, **{**options, "tally": tally})
    return o, float(tally[1] / tally[2])


def top_p_for(row: Row, kind: str, calls: list) -> float:
    """Return the `top_p` with the same mean density as `topk`, to within one per cent."""
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
    """Return the relative error against dense attention, the density, and the share of the attention mass that is read."""
    errors, masses, densities = [], [], []
    for call in calls:
        layer = layer_of(row, kind, call, top_p)
        (q, k, v), options = call
        plans: list[SparsePlan] = []
        plan_of = layer._plan
        layer._plan = lambda *args, plan_of=plan_of, plans=plans: (
            plans.append(plan_of(*args)) or plans[-1]
        )
        o, density = with_density(layer, call)
        scale = options.get("scale")
        exact = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        errors.append(float((o - exact).norm() / exact.norm()))
        densities.append(density)
        if options.get("text", "none") == "none":
            masses.append(float(plans[0].recall(q, k, scale=scale).mean()))
    result = {"error": float(np.mean(errors)), "density": float(np.mean(densities))}
    return result | ({"recall": float(np.mean(masses))} if masses else {})


def print_attention(records: list[dict[str, Any]], model: str) -> None:
    """Print the relative errors of attention outputs, one line per block size, order and router."""
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
