"""Correctness checks of the router and the selection of blocks, against the reference implementation on the CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dit_accel.bench.gpu.device import Device, Result
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.kernels import SparsePlan, block_scores

SCORE_TOLERANCE = 1e-4
"""Allowed error as a share of the largest score. Sums over blocks have another order."""
CLOSE_CALLS = 1e-3
"""Allowed share of different blocks if a sum of weights with another rounding decides (top_p)."""
ROUTERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "spread": {"spread": True},
    "smooth": {"smooth_k": True},
    "d=72, blocks of 64": {"d": 72, "block_q": 64},
    "fp16": {"dtype": torch.float16, "spread": True},
    "padding": {"k_sizes": True, "spread": True},
    "learned": {"projection": True, "spread": True},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "topk": {"topk": 0.1},
    "topk and skip": {"topk": 0.1, "skip": 0.3},
    "tail": {"topk": 0.1, "skip": 0.1, "tail_blocks": 3},
    "sink and diagonal": {"topk": 0.05, "sink_blocks": 2, "diagonal": 1},
    "causal": {"topk": 0.1, "causal": True},
    "threshold": {"threshold": 0.75},
    "top_p": {"top_p": 0.6},
    "topk and top_p": {"topk": 0.1, "top_p": 0.4, "skip": 0.2},
}


def router(device: Device, **options: Any) -> Result:
    """Compare `block_scores` with the reference implementation."""
    d, dtype = options.pop("d", 128), options.pop("dtype", torch.bfloat16)
    blocks = {"block_q": options.pop("block_q", 128), "block_k": 64}
    q, k = (
        torch.randn(2, n, h, d, device=device.place).to(dtype).transpose(1, 2)
        for n, h in ((700, 4), (1000, 2))
    )
    if options.get("k_sizes"):
        starts = torch.arange(-(-1000 // 64), device=device.place) * 64
        lengths = torch.tensor([1000, 333], device=device.place)
        options["k_sizes"] = (lengths[:, None] - starts).clamp(0, 64)
    if options.get("projection"):
        near = 0.05 * torch.randn(4, d, d, device=device.place)
        options["projection"] = torch.eye(d, device=device.place) + near
    with device.poisoned():
        scores = block_scores(q, k, **blocks, **options)
    if device.dry:
        return {"passed": True}
    options = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in options.items()}
    expected = block_scores(q.cpu(), k.cpu(), **blocks, **options)
    error = (scores.cpu() - expected).abs().max().item()
    allowed = SCORE_TOLERANCE * max(1.0, expected.abs().max().item())
    again = block_scores(q, k, **blocks, **{n: _on(device, x) for n, x in options.items()})
    repeats = torch.equal(scores, again)
    return {"passed": error <= allowed and repeats, "error": error, "repeats": repeats}


def _on(device: Device, x: Any) -> Any:
    return x.to(device.place) if isinstance(x, Tensor) else x


def selection(device: Device, **options: Any) -> Result:
    """Compare `SparsePlan.from_scores` with the reference implementation, on scores with many ties."""
    length, block_q, block_k = 5003, 128, 64
    n_q, n_k = -(-length // block_q), -(-length // block_k) - options.get("tail_blocks", 0)
    scores = torch.randn(2, 3, n_q, n_k, device=device.place)
    if "top_p" not in options:
        scores = (scores * 4).round() / 4
    geometry: dict[str, Any] = {
        "block_q": block_q,
        "block_k": block_k,
        "q_len": length,
        "kv_len": length,
    }
    with device.poisoned():
        plan = SparsePlan.from_scores(scores, **geometry, **options)
    kept, linear = plan.to_block_mask(), plan.linear_blocks("marginal")
    if device.dry:
        return {"passed": True}
    expected = SparsePlan.from_scores(scores.cpu(), **geometry, **options)
    differ = [
        (a.cpu() != b).float().mean().item()
        for a, b in (
            (kept, expected.to_block_mask()),
            (linear, expected.linear_blocks("marginal")),
        )
    ]
    allowed = CLOSE_CALLS if "top_p" in options else 0.0
    return {
        "passed": max(differ) <= allowed,
        "blocks_differ": differ[0],
        "linear_differ": differ[1],
    }


def sub_steps() -> Iterator[SubStep]:
    def of(function: Callable[..., Result], options: dict[str, Any]) -> Any:
        return lambda device, found: function(device, **options)

    for name, options in ROUTERS.items():
        yield SubStep("checks", f"router {name}", of(router, options), 1.0)
    for name, options in SELECTIONS.items():
        yield SubStep("checks", f"selection {name}", of(selection, options), 1.0)
