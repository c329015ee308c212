"""Group offloading of diffusers on a machine without a second device."""

import contextlib
from types import SimpleNamespace

import torch
from diffusers.hooks import group_offloading

CPU = torch.device("cpu")


def copying_stream(monkeypatch):
    """Return a fake stream with which loaded weights are copies, as on a device, and offloaded weights stay unchanged."""
    stream = SimpleNamespace(synchronize=lambda: None)
    backend = SimpleNamespace(
        stream=lambda _: contextlib.nullcontext(), current_stream=lambda: stream
    )
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device: backend)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    return stream


def group_offload(transformer, stream=None, *, how="leaf_level", path=None):
    """Enable group offloading.

    Args:
        stream: result of `copying_stream`. None: without streams.
        how: "leaf_level" or "block_level".
        path: folder on a disk that holds the weights.
    """
    config = group_offloading.GroupOffloadingConfig(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=how,
        non_blocking=stream is not None,
        record_stream=False,
        low_cpu_mem_usage=False,
        num_blocks_per_group=1,
        stream=stream,
        offload_to_disk_path=path,
    )
    group_offloading._apply_group_offloading(transformer, config)
