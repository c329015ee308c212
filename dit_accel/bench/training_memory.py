"""Memory of a training step as torch accounts for it: what autograd keeps, the peak of allocations, and operators."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dit_accel.bench.timing import peak_gpu_bytes

Function = Callable[[], Any]


def saved_bytes(forward: Function, known: Iterable[Tensor] = ()) -> int:
    """Return the bytes that autograd keeps between forward and backward.

    Each storage that autograd saves counts once and whole, whatever part of it is needed.

    Args:
        forward: forward pass. It has to return its output, which holds what was saved.
        known: tensors whose storages do not count, such as weights and inputs.
    """
    # Storages are held here, so that no new one gets the address of one that was freed.
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in known}
    found = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal found
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage
            found += storage.nbytes()
        # Detached: an operator that kept its own output with its graph would never be freed.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    del output
    return found


def peak_bytes(function: Function, device: str) -> int:
    """Return the most bytes that torch's allocator holds at once during a call, over those held before it.

    On a CPU every allocation and release of the allocator counts, also inside operators. What libraries allocate
    for themselves (oneDNN, MKL) does not pass through it. On a GPU it is `torch.cuda.max_memory_allocated`, and the
    function is called twice.

    Args:
        function: function without arguments.
        device: "cpu" or a CUDA device.
    """
    if device != "cpu":
        return peak_gpu_bytes(function)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    # Not `found.events()`, which gives each operator the sum of its allocations and loses their order.
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(x.start_ns(), x.nbytes()) for x in events if x.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        held += change
        most = max(most, held)
    del found, events
    gc.collect()  # the profiler's records are large, and in a cycle
    return most


def attention_operators(function: Function) -> list[str]:
    """Return the names of torch's fused attention operators that a function calls, sorted."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    prefix = "aten::_scaled_dot_product"
    names = {x.key.removeprefix("aten::") for x in found.key_averages() if x.key.startswith(prefix)}
    return sorted(names)
