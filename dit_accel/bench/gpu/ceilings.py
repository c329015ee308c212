"""Peak rates of the device, and the dense attention functions that serve as baselines."""

import functools
from collections.abc import Iterator

import torch

from dit_accel.bench.gpu.cases import DENSE_TORCH, SD3, WAN, Shape, dense_functions, inputs
from dit_accel.bench.gpu.dense import TILES, DenseTile, dense_attention
from dit_accel.bench.gpu.device import Device, Result
from dit_accel.bench.gpu.journal import SubStep

MATMUL = 8192
COPY_BYTES = 2**30


def facts(device: Device, found: dict[str, Result]) -> Result:
    """Return the properties of the device from its driver."""
    if device.dry:
        return {}
    p = torch.cuda.get_device_properties(0)
    names = ("multi_processor_count", "L2_cache_size", "shared_memory_per_multiprocessor")
    facts = {name: getattr(p, name) for name in names if hasattr(p, name)}
    return {"memory_gib": p.total_memory / 2**30, **facts}


def matmul(device: Device, found: dict[str, Result]) -> Result:
    a, b = (
        torch.randn(MATMUL, MATMUL, device=device.place, dtype=torch.bfloat16) for _ in range(2)
    )
    times = device.times({"matmul": lambda: a @ b}, 20)
    return {"tflops": 2 * MATMUL**3 / times["matmul"]["p50"] / 1e9, "ms": times["matmul"]}


def bandwidth(device: Device, found: dict[str, Result]) -> Result:
    x = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device.place)
    y = torch.empty_like(x)
    times = device.times({"copy": lambda: y.copy_(x)}, 20)
    return {"tb_per_s": 2 * COPY_BYTES / times["copy"]["p50"] / 1e9, "ms": times["copy"]}


def yardstick(shape: Shape) -> SubStep:
    """Return a function that times every tile of the dense kernel and torch's attention, and compares the outputs."""

    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, shape)
        functions = dense_functions(device, q, k, v, None)
        functions |= {x.label: functools.partial(dense_attention, q, k, v, x) for x in TILES}
        names = tuple(x.label for x in TILES)
        times = device.times(functions, 5, optional=(*DENSE_TORCH, *names))
        best = min((x for x in names if x in times), key=lambda x: times[x]["p50"])
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).float()
        ours = dense_attention(q, k, v, next(x for x in TILES if x.label == best)).float()
        error = device.number(lambda: (ours - plain).norm() / plain.norm())
        if not device.dry and not error < 1e-2:
            raise AssertionError(f"dense kernel: relative error {error:.3g} exceeds the tolerance")
        rates = {
            f"{n}_tflops": shape.flops / x["p50"] / 1e9 for n, x in times.items() if n != "refused"
        }
        return {"best": best, "relative_error": error, **rates, "ms": times}

    return SubStep("yardstick", shape.name, run, 8.0, 7 * 5 * shape.flops)


def best_tile(found: dict[str, Result], shape: Shape) -> DenseTile:
    """Return the fastest tile of the dense kernel for a head_dim, from the measurements of this run."""
    wide = SD3 if shape.head_dim == SD3.head_dim else WAN
    label = found.get(f"yardstick/{wide.name}", {}).get("best")
    return next((x for x in TILES if x.label == label), TILES[0])


def sub_steps() -> Iterator[SubStep]:
    yield SubStep("ceilings", "facts", facts, 1.0)
    yield SubStep("ceilings", "matmul", matmul, 5.0)
    yield SubStep("ceilings", "bandwidth", bandwidth, 2.0)


def yardsticks() -> Iterator[SubStep]:
    yield yardstick(WAN)
    yield yardstick(SD3)
