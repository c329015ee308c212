"""Times of the launches, the kernels and the host code of a call, and its memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.bench.gpu.cases import MODES, WAN, Layer, dense_functions, inputs
from dit_accel.bench.gpu.device import Device, Result, first_line
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.gpu.speed import held_launches, options_of

TOPK = 0.05


def profile(mode: str) -> SubStep:
    """Return a function that times every launch of a whole call alone, lists every kernel, and times the host."""

    @torch.no_grad()
    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, WAN)
        layer = Layer(device, WAN, mode, TOPK)
        scores = layer.route(q, k)
        plan = layer.plan(scores)
        held = held_launches(lambda: layer(q, k, v))
        functions = {f"{i} {x.name}": x for i, x in enumerate(held)}
        options = {f"{i} {x.name}": options_of(x) for i, x in enumerate(held)}
        result: Result = {
            "triton_launches": len(held),
            "host_us": {
                "call": device.host_us(lambda: layer(q, k, v)),
                "router": device.host_us(lambda: layer.route(q, k)),
                "plan": device.host_us(lambda: layer.plan(scores)),
                "attention": device.host_us(lambda: layer.attend(q, k, v, plan)),
            },
            "ms": device.times(functions, 10),
            "options": options,
        }
        try:
            result["kernels"] = device.profile(lambda: layer(q, k, v))
        except Exception as error:  # profiling may not be permitted
            device.wait()
            result["profiler_refused"] = first_line(error)
        return result

    return SubStep("profile", mode, run, 4.0)


def memory(mode: str) -> SubStep:
    """Return a function that compares the memory of a call and of its gradients with flash attention."""

    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, WAN, grad=True)
        layer = Layer(device, WAN, mode, TOPK)
        upstream = torch.randn_like(q)

        def flash() -> Any:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v)

        def with_gradients(attend: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(attend(), (q, k, v), upstream)

        result: Result = {}
        for name, attend in (("flash", flash), ("ours", lambda: layer(q, k, v))):
            with torch.no_grad():
                result[f"{name}_forward_mib"] = device.peak_mib(attend)
            result[f"{name}_with_gradients_mib"] = device.peak_mib(with_gradients(attend))
        for name in ("forward", "with_gradients"):
            result[f"of_flash_{name}"] = result[f"ours_{name}_mib"] / result[f"flash_{name}_mib"]
        return result

    return SubStep("memory", mode, run, 3.0, 12 * WAN.flops)


def flex(mode: str) -> SubStep:
    """Return a function that times `backend="flex"` and the default backend with their plans ready.

    An error of the flex backend is a result, not a failure.
    """

    @torch.no_grad()
    def run(device: Device, found: dict[str, Result]) -> Result:
        q, k, v = inputs(device, WAN)
        layer = Layer(device, WAN, mode, TOPK)
        other = Layer(device, WAN, mode, TOPK, backend="flex")
        other.options = {**layer.options, "backend": "flex"}
        plan = layer.plan(layer.route(q, k))
        functions = {
            "flash": dense_functions(device, q, k, v, None)["flash"],
            "default": lambda: layer.attend(q, k, v, plan),
        }
        if not device.dry:  # FlexAttention compiles for a real device only
            functions["flex"] = lambda: other.attend(q, k, v, plan)
        times = device.times(functions, 8, optional=("flash", "flex"))
        result: Result = {"ms": times}
        if "flex" in times:
            a, b = other.attend(q, k, v, plan).float(), layer.attend(q, k, v, plan).float()
            result["relative_distance"] = device.number(lambda: (a - b).norm() / b.norm())
            result["flex_over_default"] = times["default"]["p50"] / times["flex"]["p50"]
        return result

    return SubStep("flex", mode, run, 30.0, 3 * 10 * WAN.flops)


def profiles() -> Iterator[SubStep]:
    for mode in ("none", "complement", "shared_softmax", "all"):
        yield profile(mode)


def memories() -> Iterator[SubStep]:
    for mode in MODES:
        yield memory(mode)


def flexes() -> Iterator[SubStep]:
    for mode in ("none", "complement", "shared_softmax"):
        yield flex(mode)
