"""Random problems for every mode of sparse-linear attention, and comparison with the reference."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.kernels import SparsePlan, block_sparse_attention, sparse_linear_attention
from dit_accel.kernels.block_sparse.reference import (
    block_sparse_reference,
    sparse_linear_reference,
)

from ..tolerance import assert_kernel_close
from .plan_cases import DENSITIES, geometries, random_block_mask

FEATURE_MAPS = ("softmax", "elu", "relu")
SCOPES = ("marginal", "complement", "all")
UNORDERED = ("all", "kv_lengths", "ragged")  # rules under which a block has a summary
GROUPS = ((1, 1), (2, 1), (3, 1), (2, 2), (4, 2))


@dataclass
class Problem:
    """Inputs in fp64, a plan, and the arguments of the call."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: SparsePlan
    options: dict[str, Any] = field(default_factory=lambda: {"combine": "none"})
    """Arguments of `sparse_linear_attention`; tensors among them in fp64."""

    def rounded(self, dtype: torch.dtype) -> "Problem":
        """Return the problem with all numbers rounded to `dtype`, so that all computations start from the same numbers."""
        options = {
            name: x.to(dtype).double() if isinstance(x, Tensor) else x
            for name, x in self.options.items()
        }
        q, k, v = (x.to(dtype).double() for x in (self.q, self.k, self.v))
        return Problem(q, k, v, self.plan, options)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return fresh copies, in `dtype`, of all tensors that get a gradient, with the same strides."""
        tensors = {"q": self.q, "k": self.k, "v": self.v} | {
            name: x for name, x in self.options.items() if isinstance(x, Tensor)
        }
        return {name: x.detach().clone().to(dtype).requires_grad_() for name, x in tensors.items()}

    def outputs(self, leaves: dict[str, Tensor], backend: str | None) -> list[Tensor]:
        """Return `[o]`, and lse if there is no summary. The backend "reference" is the reference implementation."""
        q, k, v, plan = leaves["q"], leaves["k"], leaves["v"], self.plan
        options = {name: leaves.get(name, x) for name, x in self.options.items()}
        if self.options["combine"] == "none":
            scale = self.options.get("scale")
            if backend == "reference":
                return list(block_sparse_reference(q, k, v, plan, scale=scale))
            return list(
                block_sparse_attention(q, k, v, plan, scale=scale, return_lse=True, backend=backend)
            )
        if backend == "reference":
            return [sparse_linear_reference(q, k, v, plan, **options)]
        return [sparse_linear_attention(q, k, v, plan, **options, backend=backend)]

    def results(self, dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
        """Return outputs and gradients by name, for upstream gradients that depend on the shape only."""
        leaves = self.leaves(dtype)
        outputs = self.outputs(leaves, backend)
        g = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in outputs]
        if len(outputs) > 1:  # nothing flows into the lse of a query without any key
            upstream[1] = upstream[1].masked_fill(outputs[1].detach() == -torch.inf, 0.0)
        grads = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            [x.to(y.dtype) for x, y in zip(upstream, outputs, strict=True)],
        )
        named = dict(zip(("o", "lse"), (x.detach() for x in outputs), strict=False))
        return named | {f"grad_{name}": x for name, x in zip(leaves, grads, strict=True)}


def make_tensors(g: torch.Generator, batch, heads, kv_heads, plan, d, d_v, strided) -> list[Tensor]:
    """Return random q, k, v in fp64. `strided`: with the memory layout `[B, L, H, D]` of diffusers."""
    tensors = []
    for h, l, width in (
        (heads, plan.q_len, d),
        (kv_heads, plan.kv_len, d),
        (kv_heads, plan.kv_len, d_v),
    ):
        shape = (batch, l, h, width) if strided else (batch, h, l, width)
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        tensors.append(x.transpose(1, 2) if strided else x)
    return tensors


@st.composite
def plans(draw, longest: int, batch: int, heads: int, combine: str, blocks) -> SparsePlan:
    rules = (
        UNORDERED
        if combine != "none"
        else (*UNORDERED, "causal", "shifted", "window", "causal_kv_lengths")
    )
    geometry = draw(geometries(longest, blocks=blocks, rules=rules, batch=batch))
    seed = draw(st.integers(0, 2**16), label="seed")
    g = torch.Generator().manual_seed(seed)
    leading = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    mask = random_block_mask(geometry, draw(st.sampled_from(DENSITIES)), leading, seed)
    if draw(st.booleans(), label="skip"):
        geometry["skip"] = torch.rand(mask.shape, generator=g) < 0.3
    if "q_block_sizes" not in geometry and draw(st.integers(0, 3)) == 0:
        n = draw(st.sampled_from([1, heads]))
        geometry["q_order"] = torch.stack(
            [torch.randperm(geometry["q_len"], generator=g) for _ in range(n)]
        )
    if combine == "none" and draw(st.integers(0, 2)) == 0:
        kv_len = geometry["kv_len"]
        n = draw(st.integers(1, min(kv_len, 40)), label="columns")
        columns = torch.stack(
            [torch.randperm(kv_len, generator=g)[:n].sort().values for _ in range(leading[1])]
        )[None]
        columns[..., n - draw(st.integers(0, n)) :] = kv_len
        geometry["columns"] = columns
    return SparsePlan.from_block_mask(mask, **geometry)


@st.composite
def problems(
    draw,
    longest: int,
    *,
    blocks=(16, 32, 64),
    head_dims=(16, 24, 40, 64, 72, 80, 96),
    combines=("none", "none", "shared_softmax", "proj", "alpha"),
) -> Problem:
    """Draw a problem: any plan with any valid combination of arguments."""
    batch = draw(st.integers(1, 2), label="batch")
    heads, kv_heads = draw(st.sampled_from(GROUPS), label="heads")
    combine = draw(st.sampled_from(combines), label="combine")
    plan = draw(plans(longest, batch, heads, combine, blocks))
    d = draw(st.sampled_from(head_dims), label="head_dim")
    d_v = draw(st.sampled_from([d, d, 16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    q, k, v = make_tensors(g, batch, heads, kv_heads, plan, d, d_v, draw(st.booleans()))
    options: dict[str, Any] = {"combine": combine}
    if draw(st.booleans()):
        options["scale"] = 0.2
    if combine in ("proj", "alpha"):
        options["feature_map"] = draw(st.sampled_from(FEATURE_MAPS))
        options["linear_scope"] = draw(st.sampled_from(SCOPES))
        if options["feature_map"] == "relu":
            # A denominator that is nearly 0 magnifies rounding without bound, in every formula.
            q, k = q + 1, k + 1
    if combine == "proj":
        options["proj_weight"] = torch.randn(d_v, d_v, generator=g, dtype=torch.float64) / d_v**0.5
        if draw(st.booleans()):
            options["proj_bias"] = torch.randn(d_v, generator=g, dtype=torch.float64)
    if combine == "alpha":
        per_block = (draw(st.sampled_from([1, batch])), heads, plan.num_q_blocks)
        shape = draw(st.sampled_from([(heads,), per_block]))
        options["alpha"] = torch.rand(shape, generator=g, dtype=torch.float64)
    return Problem(q, k, v, plan, options)


SUMMED = ("grad_alpha", "grad_proj_weight", "grad_proj_bias")


def assert_results_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float):
    """Assert that every error is at most `tolerance` * max(1, largest expected value of the problem).

    The scale is that of the problem, not of each result, because a gradient may be 0 through cancellation of large terms.
    A gradient that is summed over all rows has another scale, the size of its sum without cancellation: the square root
    of the number of terms, times the size of the output (upstream gradients have unit size).
    """
    largest = max(
        [1.0, *(x[~x.isinf()].abs().max().item() for x in expected.values() if (~x.isinf()).any())]
    )
    for name, x in expected.items():
        assert torch.equal(actual[name].isinf(), x.isinf()), f"{name}: infinite in other places"
        finite = ~x.isinf()
        error = (actual[name].double() - x)[finite].abs()
        scale = largest
        if name in SUMMED and x.numel():
            terms = expected["o"].numel() / x.numel()
            scale = max(scale, (terms * expected["o"].square().mean()).sqrt().item())
        allowed = tolerance * scale
        worst = error.max().item() if error.numel() else 0.0
        assert worst <= allowed, f"{name}: error {worst:.2e} > {allowed:.2e}"


def assert_half_close(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    """Assert the rule of two (tolerance.py) for every result. The gradients of q, k and v share one scale.

    A single gradient may be 0 in exact arithmetic, and by chance in plain torch, through cancellation of large terms.
    """
    problem = problem.rounded(dtype)
    results = [
        problem.results(dtype, backend),
        problem.results(torch.float64, "reference"),
        problem.results(dtype, "reference"),
    ]
    # Plain torch overflows where a denominator is 1e-5; the kernel then has to be as good as rounding.
    results[2] = {
        n: torch.where(x.isfinite() | results[1][n].isinf(), x, results[1][n].to(x.dtype))
        for n, x in results[2].items()
    }
    # alpha's is a few sums that torch makes on both sides.
    names = [n for n in results[1] if not n.startswith("grad_") or n == "grad_proj_weight"]
    for name in names:
        assert_kernel_close(name, *(x[name] for x in results))
    inputs = ("grad_q", "grad_k", "grad_v")
    assert_kernel_close("inputs", *(torch.cat([x[n].flatten() for n in inputs]) for x in results))
