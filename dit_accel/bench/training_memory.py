"""Memory of a training step: bytes that autograd saves, peak of torch's allocator, and attention operators."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dit_accel.bench.timing import peak_gpu_bytes

Function = Callable[[], Any]


def saved_bytes(forward: Function, known: Iterable[Tensor] = ()) -> int:
    """Return the number of bytes that autograd saves between forward and backward pass.

    Each saved storage counts once and in full, even if only a part of it is needed.

    Args:
        forward: forward pass. It must return its output, which keeps the saved tensors alive.
        known: tensors whose storages do not count, such as weights and inputs.
    """
    # References keep the storages alive, so that no new storage reuses the address of a freed one.
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in known}
    found = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal found
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage
            found += storage.nbytes()
        # Detached, because an operator that saves its own output with its graph would never be freed.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    del output
    return found


def peak_bytes(function: Function, device: str) -> int:
    """Return the peak number of bytes in torch's allocator during a call, minus those before the call.

    On a CPU every allocation and release of the allocator counts, including those inside operators, but not the
    allocations of libraries (oneDNN, MKL). On a GPU it is `torch.cuda.max_memory_allocated`, and the function is called
    twice.

    Args:
        function: function without arguments.
        device: "cpu" or a CUDA device.
    """
    if device != "cpu":
        return peak_gpu_bytes(function)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    # `found.events()` has only the sum of the allocations of each operator, not their order.
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(x.start_ns(), x.nbytes()) for x in events if x.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        held += change
        most = max(most, held)
    del found, events
    gc.collect()  # the profiler's records are large and part of a reference cycle
    return most


def attention_operators(function: Function) -> list[str]:
    """Return the sorted names of torch's fused attention operators that a function calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    prefix = "aten::_scaled_dot_product"
    names = {x.key.removeprefix("aten::") for x in found.key_averages() if x.key.startswith(prefix)}
    return sorted(names)
