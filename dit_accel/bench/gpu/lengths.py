"""Measurement of the crossover: the length from which sparse attention, with routing and planning, is faster than dense."""

import functools
from collections.abc import Iterator

import torch

from dit_accel.bench.gpu.cases import DENSE_TORCH, Layer, Shape, dense_functions, inputs
from dit_accel.bench.gpu.device import Device, Result
from dit_accel.bench.gpu.journal import SubStep

LENGTHS = (1024, 2048, 4096, 8192, 16384, 65536, 131072)
TOPKS = (0.05, 0.25)


def crossover(length: int) -> SubStep:
    """Return a function that times dense attention and sparse layers of one length in turns."""
    shape = Shape(f"length {length}", 12, length, 128)

    @torch.no_grad()
    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, shape)
        functions = dense_functions(device, q, k, v, None)
        for topk in TOPKS:
            for mode in ("none", "shared_softmax"):
                layer = Layer(device, shape, mode, topk)
                name = f"{mode} {topk:.0%}"
                functions[f"{name} eager"] = functools.partial(layer, q, k, v)
                functions[f"{name} graph"] = device.graph(functools.partial(layer, q, k, v))
        times = device.times(functions, 12 if length < 65536 else 4, optional=DENSE_TORCH)
        dense = min(times[n]["p50"] for n in DENSE_TORCH if n in times)
        faster = {n: dense / x["p50"] for n, x in times.items() if n != "refused"}
        return {"length": length, "x_best_dense": faster, "ms": times}

    turns = 14 if length < 65536 else 6
    return SubStep("crossover", f"{length}", run, 4.0, 3 * turns * shape.flops)


def sub_steps() -> Iterator[SubStep]:
    for length in LENGTHS:
        yield crossover(length)
