"""Times of attention layers, forward and backward, in turns with dense attention."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dit_accel.bench.gpu.cases import (
    DENSE_TORCH,
    MODES,
    SD3,
    WAN,
    WAN_720P,
    Layer,
    Shape,
    dense_functions,
    inputs,
)
from dit_accel.bench.gpu.ceilings import best_tile
from dit_accel.bench.gpu.device import Device, Result, first_line
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.gpu.recording import HeldLaunch, launches
from dit_accel.bench.timing import Functions

# Number of dense forward passes in a turn (flash, cuDNN, Triton), for estimates of time.
DENSE = 3
DENSE_NAMES = ("flash", "cudnn", "dense triton")


def repeats(shape: Shape) -> int:
    """Return the number of turns: fewer for shapes with slow dense attention."""
    return 12 if shape.flops < 1e13 else 4


def held_launches(function: Callable[[], Any]) -> list[HeldLaunch]:
    """Run a call and return its Triton launches."""
    with launches() as held:
        function()
    return held


def longest(device: Device, held: list[HeldLaunch]) -> HeldLaunch:
    """Return the launch with the longest time, the attention kernel."""
    if device.dry:
        return held[-1]
    times = device.times({str(i): x for i, x in enumerate(held)}, 3)
    return held[int(max(times, key=lambda i: times[i]["p50"]))]


def ratios(times: Result, *, flops: float, shares: dict[str, float], density: float) -> Result:
    """Return the rate of each function, its speed-up over flash attention, and its ratio to the dense Triton kernel.

    Args:
        times: milliseconds by name.
        flops: FLOPs of a dense call.
        shares: share of these FLOPs that a function does, by name; 0 for functions without attention.
        density: share for all other functions.

    Returns:
        By name: `tflops` (rate of attended FLOPs), `x_flash` (speed-up over flash attention), and `of_yardstick` (rate /
        rate of the dense Triton kernel). The last two only if the baseline was measured.
    """
    rows = {name: x["p50"] for name, x in times.items() if name != "refused"}
    found: Result = {}
    for name, ms in rows.items():
        share = 1.0 if name in DENSE_NAMES else shares.get(name, density)
        if not share:
            continue
        found[name] = {"tflops": flops * share / ms / 1e9}
        if "flash" in rows:
            found[name]["x_flash"] = rows["flash"] / ms
        if "dense triton" in rows:
            found[name]["of_yardstick"] = rows["dense triton"] * share / ms
    return found


def forward(shape: Shape, topk: float, mode: str) -> SubStep:
    """Return a function that times one mode: the kernel alone, attention with its plan ready, and a whole call, eager and as
    a CUDA graph."""

    @torch.no_grad()
    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, shape)
        layer = Layer(device, shape, mode, topk)
        scores = layer.route(q, k)
        plan = layer.plan(scores)
        kernel = longest(device, held_launches(lambda: layer.attend(q, k, v, plan)))
        functions = dense_functions(device, q, k, v, best_tile(found, shape))
        functions |= {
            "kernel": kernel,
            "attention": lambda: layer.attend(q, k, v, plan),
            "router": lambda: layer.route(q, k),
            "plan": lambda: layer.plan(scores),
            "eager": lambda: layer(q, k, v),
        }
        result: Result = {"kernel": kernel.name, "kernel_options": options_of(kernel)}
        try:
            functions["graph"] = device.graph(lambda: layer(q, k, v))
        except Exception as error:
            device.wait()
            result["graph_refused"] = first_line(error)
        times = device.times(functions, repeats(shape), optional=(*DENSE_TORCH, "dense triton"))
        density = layer.density(device, plan)
        # Text queries use dense attention, not this kernel.
        image = device.number(plan.density) * shape.tokens / shape.length
        shares = {"kernel": image, "router": 0.0, "plan": 0.0}
        of = ratios(times, flops=shape.flops, shares=shares, density=density)
        shown = {f"x_flash_{n}": of[n].get("x_flash", 0.0) for n in ("kernel", "eager") if n in of}
        if "graph" in of:
            shown["x_flash_graph"] = of["graph"].get("x_flash", 0.0)
        return {**result, "density": density, **shown, "ms": times, "ratios": of}

    name = f"{shape.name}, {topk:.0%}, {mode}"
    return SubStep("speed", name, run, 4.0, (DENSE + 1) * (repeats(shape) + 2) * shape.flops)


def options_of(launch: HeldLaunch) -> dict[str, Any]:
    """Return the tile and the options of a launch."""
    names = ("TQ", "TK", "num_warps", "num_stages")
    return {n: launch.keywords[n] for n in names if n in launch.keywords}


def backward(shape: Shape, topk: float, mode: str) -> SubStep:
    """Return a function that times the backward pass alone: gradients of q, k and v after one forward pass."""

    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, shape, grad=True)
        layer = Layer(device, shape, mode, topk)
        plan = layer.plan(layer.route(q, k))
        o = layer.attend(q, k, v, plan)
        upstream = torch.randn_like(o)

        def gradients(output: Tensor) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(output, (q, k, v), upstream, retain_graph=True)

        ours = gradients(o)
        held = held_launches(ours)
        functions: Functions = {}
        refused = {}
        for name, attend in dense_functions(device, q, k, v, None).items():
            try:
                functions[name] = gradients(attend())
            except Exception as error:
                device.wait()
                refused[name] = first_line(error)
        functions |= {"backward": ours, **{f"launch {x.name}": x for x in reversed(held)}}
        times = device.times(functions, repeats(shape), optional=DENSE_TORCH)
        density = layer.density(device, plan)
        of = ratios(times, flops=2.5 * shape.flops, shares={}, density=density)
        launched = sum(x["p50"] for n, x in times.items() if n.startswith("launch "))
        return {
            "x_flash": of["backward"].get("x_flash", 0.0),
            "launches_ms": launched,
            "density": density,
            "ms": times,
            "ratios": of,
            **({"refused": refused} if refused else {}),
        }

    name = f"{shape.name}, {topk:.0%}, {mode}"
    turns = repeats(shape) + 2
    return SubStep("backward", name, run, 4.0, (2 * 2.5 + 3) * turns * shape.flops)


def forwards() -> Iterator[SubStep]:
    for mode in MODES:
        yield forward(WAN, 0.05, mode)
    for mode in ("none", "complement", "shared_softmax"):
        yield forward(SD3, 0.25, mode)
    yield forward(WAN_720P, 0.05, "none")


def more_forwards() -> Iterator[SubStep]:
    """Yield the other forward measurements, which a short run skips."""
    for topk in (0.1, 0.25):
        yield forward(WAN, topk, "none")
    for topk in (0.05, 0.1, 0.25):
        for mode in MODES:
            if (topk, mode) != (0.05, "none"):
                yield forward(WAN_720P, topk, mode)
    for mode in ("none", "complement", "shared_softmax"):
        yield forward(SD3, 0.1, mode)


def backwards() -> Iterator[SubStep]:
    for mode in MODES:
        yield backward(WAN, 0.05, mode)
