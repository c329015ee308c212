"""Correctness checks: every mode, forward and backward, against the plain formulas at small sizes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.bench.gpu.device import Device, Result
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.gpu.tolerance import errors
from dit_accel.kernels import SparsePlan, block_sparse_attention, sparse_linear_attention
from dit_accel.kernels.block_sparse.reference import (
    block_sparse_reference,
    sparse_linear_reference,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCH, Q_LEN = 2, 300
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """Problem to check: mode, dtype, geometry, and arguments of its plan."""

    name: str
    combine: str = "none"
    scope: str = "complement"
    feature_map: str = "softmax"
    dtype: str = "bf16"
    head_dim: int = 128
    heads: int = 4
    kv_heads: int = 2
    lists: int | None = None
    """Number of heads with lists. Default: lists for each query head."""
    kv_len: int = 517
    blocks: tuple[int, int] = (128, 64)
    plan: dict[str, Any] = field(default_factory=dict)
    """Arguments of `SparsePlan.from_scores`. Default: the best 40 % of the blocks, 20 % skipped."""
    rule: str = ""
    """Additional rule: "columns", "kv_lengths", "tiles" (ragged blocks), "order" (permuted queries), "long" (split rows)."""


LINEAR = [(c, s) for c in ("proj", "alpha") for s in ("all", "complement", "marginal")]
MODES = [("none", ""), ("shared_softmax", ""), *LINEAR]


def checks() -> Iterator[Check]:
    """Yield the problems, the most common cases first."""
    for dtype, d in (("bf16", 128), ("fp16", 64), ("fp32", 64)):
        for combine, scope in MODES:
            name = f"{combine} {scope}".strip()
            yield Check(f"{name}, {dtype}, d={d}", combine, scope, dtype=dtype, head_dim=d)
    causal = {"topk": 0.4, "causal": True}
    window = {**causal, "window": 100, "sink": 20}
    for dtype in ("bf16", "fp32"):
        yield Check(f"causal, {dtype}", dtype=dtype, plan=causal, blocks=(64, 64))
        yield Check(f"window and sink, {dtype}", dtype=dtype, plan=window, blocks=(64, 64))
        yield Check(f"columns, {dtype}", dtype=dtype, rule="columns", blocks=(64, 64))
    yield Check("causal columns", plan=causal, rule="columns", blocks=(64, 64))
    for combine, scope in (("none", ""), ("shared_softmax", ""), ("alpha", "complement")):
        for rule in ("kv_lengths", "tiles", "order"):
            yield Check(f"{rule}, {combine}", combine, scope or "complement", rule=rule)
    yield Check("split rows", plan={"topk": 0.6}, rule="long", kv_len=9000)
    # Cases with several query heads in one tile.
    shared: dict[str, Any] = {"heads": 8, "lists": 1, "blocks": (64, 64)}
    yield Check("shared lists", plan=causal, **shared)
    split = {"topk": 0.6, "causal": True}
    yield Check("shared lists, split rows", plan=split, rule="long", kv_len=9000, **shared)
    plans = ({"top_p": 0.7}, {"threshold": 0.5}, {"topk": 0.2, "top_p": 0.5})
    for plan in plans:
        label = " and ".join(f"{n} {x}" for n, x in plan.items())
        for combine, scope in (("none", ""), ("proj", "complement"), ("proj", "marginal")):
            extra = {"skip": 0.2} if scope == "marginal" else {}
            name = f"{label}, {combine} {scope}".strip()
            yield Check(name, combine, scope or "complement", plan={**plan, **extra})
    for d in (72, 96, 256):
        for combine in ("none", "shared_softmax", "proj"):
            yield Check(f"{combine}, d={d}", combine, head_dim=d, blocks=(64, 64))
    yield Check("none, d=256, fp32", dtype="fp32", head_dim=256, blocks=(64, 64))
    for feature_map in ("elu", "relu"):
        yield Check(f"alpha, {feature_map}", "alpha", feature_map=feature_map)
    yield Check("one head of keys", heads=4, kv_heads=1)
    yield Check("blocks of 32", "shared_softmax", blocks=(32, 32), head_dim=64)
    yield Check("blocks of 128", "alpha", blocks=(128, 128))


class Problem:
    """Tensors, plan and options of a check, on a device."""

    def __init__(self, check: Check, device: Device) -> None:
        self.check, self.device = check, device
        dtype, d = DTYPES[check.dtype], check.head_dim
        self.q, self.k, self.v = (
            torch.randn(BATCH, n, h, d, device=device.place).to(dtype).transpose(1, 2)
            for n, h in ((Q_LEN, check.heads), *[(check.kv_len, check.kv_heads)] * 2)
        )
        if (
            check.feature_map == "relu"
        ):  # a denominator near 0 magnifies rounding errors without limit
            self.q, self.k = self.q + 1, self.k + 1
        self.plan = self._plan()
        self.options: dict[str, Any] = {"combine": check.combine}
        if check.combine in ("proj", "alpha"):
            self.options |= {"feature_map": check.feature_map, "linear_scope": check.scope}
        if check.combine == "proj":
            self.options["proj_weight"] = (torch.randn(d, d, device=device.place) / d**0.5).to(
                dtype
            )
        if check.combine == "alpha":
            self.options["alpha"] = torch.rand(check.heads, device=device.place).to(dtype)

    def _plan(self) -> SparsePlan:
        check, place = self.check, self.device.place
        block_q, block_k = check.blocks
        kv_len = check.kv_len
        n_q, n_k = -(-Q_LEN // block_q), -(-kv_len // block_k)
        geometry: dict[str, Any] = {"topk": 0.4, "skip": 0.2} if not check.plan else check.plan
        if check.rule == "columns":
            columns = torch.arange(3, kv_len, 37, device=place).expand(1, check.heads, -1)
            geometry = {**geometry, "columns": columns}
        elif check.rule == "kv_lengths":
            geometry = {**geometry, "kv_lengths": self._integers(kv_len, kv_len // 3)}
        elif check.rule == "tiles":
            q_sizes = torch.arange(n_q, device=place) * 11 % block_q + 1
            k_sizes = torch.arange(n_k, device=place) * 7 % block_k + 1
            geometry = {**geometry, "q_block_sizes": q_sizes, "k_block_sizes": k_sizes}
        elif check.rule == "order":
            geometry = {**geometry, "q_order": torch.arange(Q_LEN - 1, -1, -1, device=place)[None]}
        elif check.rule == "long":
            geometry = {**geometry, "long_rows": self._integers(0, n_q - 1)}
        scores = torch.randn(BATCH, check.lists or check.heads, n_q, n_k, device=place)
        return SparsePlan.from_scores(
            scores, block_q=block_q, block_k=block_k, q_len=Q_LEN, kv_len=kv_len, **geometry
        )

    def _integers(self, *numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device.place)

    def results(self, dtype: torch.dtype, kind: str) -> Results:
        """Return outputs and gradients of the kernels (kind "kernel") or the plain formulas (kind "formula")."""
        tensors = {"q": self.q, "k": self.k, "v": self.v} | {
            n: x for n, x in self.options.items() if isinstance(x, Tensor)
        }
        leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in tensors.items()}
        outputs = self._outputs(leaves, kind)
        torch.manual_seed(1)
        upstream = [torch.randn(x.shape, device=self.device.place) for x in outputs]
        if len(outputs) > 1:  # the lse of a query without any key gets no gradient
            upstream[1] = upstream[1].masked_fill(outputs[1].detach().isinf(), 0.0)
        grads = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            # Rounded once, so that both kinds start from the same numbers.
            [
                x.to(DTYPES[self.check.dtype]).to(y.dtype)
                for x, y in zip(upstream, outputs, strict=True)
            ],
        )
        named = dict(zip(leaves, grads, strict=True))
        found = dict(zip(("o", "lse"), (x.detach() for x in outputs), strict=False))
        found["inputs"] = torch.cat([named[n].flatten() for n in "qkv"])
        if "proj_weight" in named:
            found["proj_weight"] = named["proj_weight"]
        return found

    def _outputs(self, leaves: Results, kind: str) -> list[Tensor]:
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        options = {n: leaves.get(n, x) for n, x in self.options.items()}
        if self.check.combine == "none":
            if kind == "formula":
                return list(block_sparse_reference(q, k, v, self.plan))
            return list(block_sparse_attention(q, k, v, self.plan, return_lse=True))
        if kind == "formula":
            return [sparse_linear_reference(q, k, v, self.plan, **options)]
        return [sparse_linear_attention(q, k, v, self.plan, **options)]


def run(check: Check, device: Device, found: dict[str, Result]) -> Result:
    """Compare the kernels with the formulas, with memory filled with NaN, and compare two runs with each other."""
    problem, dtype = Problem(check, device), DTYPES[check.dtype]
    with device.poisoned():
        ours = problem.results(dtype, "kernel")
    exact = problem.results(torch.float64, "formula")
    plain = None if dtype == torch.float32 else problem.results(dtype, "formula")
    again = [problem.results(dtype, "kernel") for _ in range(2)]
    if device.dry:
        return {"passed": True, "repeats": True, "errors": {}}
    distances = errors(ours, exact, plain)
    repeats = all(torch.equal(again[0][n], again[1][n]) for n in again[0])
    passed = repeats and all(error <= allowed for error, allowed in distances.values())
    return {"passed": passed, "repeats": repeats, "errors": distances}


def sub_steps() -> Iterator[SubStep]:
    for check in checks():
        yield SubStep("checks", check.name, functools.partial(run, check), 1.0)
