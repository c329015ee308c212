"""`Engine`: device, precision and processes of a run (accelerate), and wrapping of the transformer (DDP, FSDP2)."""

import atexit
import contextlib
import datetime
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from dit_accel.finetune.processes import Processes
from dit_accel.sampling.devices import pick_device

TIMEOUT = datetime.timedelta(hours=2)
"""Time that processes wait for each other. Validation and saving may exceed torch's default."""


class Engine:
    """Device, precision, processes and trackers of a run.

    Args:
        config: settings of the run (`FinetuneConfig`).
        folder: output folder of the run. The folder of the trackers is inside it.

    Raises:
        ValueError: if this machine does not support the device, precision or tracker.
    """

    def __init__(self, config: Any, folder: Path) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import (
            DistributedDataParallelKwargs,
            InitProcessGroupKwargs,
            ProjectConfiguration,
        )

        place = pick_device(config.device)
        if (
            config.mixed_precision == "fp16" and place.type == "cpu"
        ):  # accelerate silently uses fp32
            raise ValueError(
                "mixed_precision='fp16': not available on a CPU; use 'no' or 'bf16', or a GPU"
            )
        ours = not torch.distributed.is_initialized()
        # accelerate keeps precision and device in a global state. Reset it for a second run in this process.
        AcceleratorState._reset_state(reset_partial_state=ours)
        GradientState._reset_state()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # torchrun assigns one GPU to each process
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(place)
        report = None if config.report_to == "none" else config.report_to
        logs = folder / config.logging_dir
        self.accelerator = Accelerator(
            cpu=place.type == "cpu",
            mixed_precision=config.mixed_precision,
            log_with=report,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(logs)),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=TIMEOUT),
            ],
        )
        self.device: torch.device = self.accelerator.device
        if ours and torch.distributed.is_initialized():
            atexit.register(_leave)
        self.processes = Processes(self.device)
        self.is_sharded = config.fsdp
        if config.allow_tf32:
            torch.set_float32_matmul_precision("high")
        self._tracked = None if report is None else config.tracker_name

    def start_trackers(self) -> Callable[..., None] | None:
        """Start the trackers. Return the function that logs to them, or None without trackers."""
        if self._tracked is None:
            return None
        self.accelerator.init_trackers(self._tracked)
        return self.accelerator.log

    def log_picture(self, name: str, picture: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Send a picture to all trackers."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [picture]}, step=step)

    def wrap(self, transformer: nn.Module, blocks: Sequence[str]) -> nn.Module:
        """Shard the transformer or wrap it in DDP, as the run requires, and return the result.

        Sharding replaces the parameters of the transformer by sharded parameters.

        Args:
            transformer: transformer on the device of this process.
            blocks: names of its lists of blocks. Each block is sharded on its own.
        """
        if self.is_sharded:
            shard(transformer, blocks, self.device, self.accelerator.mixed_precision)
            return transformer
        with warnings.catch_warnings():
            # Do not broadcast buffers: they are large constants. The new option would still broadcast them once.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare_model(transformer)

    def unwrap(self, model: nn.Module) -> None:
        """Remove the wrappers of `wrap` from the transformer. Sharding stays."""
        if not self.is_sharded:
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Context manager for one micro-batch. Only the last micro-batch of a step exchanges gradients."""
        if self.is_sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
            return
        with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def clip(self, parameters: list[nn.Parameter], largest: float) -> float:
        """Clip the gradients to a norm, and return their norm before clipping over all processes.

        Args:
            parameters: parameters whose gradients are clipped.
            largest: largest norm. 0 disables clipping.
        """
        norm = self.accelerator.clip_grad_norm_(parameters, largest or math.inf)
        return float(whole(norm))

    @property
    def loss_scale(self) -> float | None:
        """Loss scale of fp16; None in other precisions."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.get_scale()

    def close(self) -> None:
        """Finish the trackers. The process group stays open for the next run in these processes."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()


def _leave() -> None:
    """Destroy the process group when this process exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def whole(x: Tensor) -> Tensor:
    """Return a sharded tensor as a full tensor. All processes must call this function."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def shard(
    transformer: nn.Module, blocks: Sequence[str], device: torch.device, precision: str
) -> None:
    """Shard a transformer over all processes with FSDP2, block by block.

    The function calls `fully_shard` of torch, because accelerate does not shard parameters on a CPU.

    Args:
        transformer: transformer to shard in place.
        blocks: names of its lists of blocks.
        device: device of this process.
        precision: "bf16" gathers weights in bf16 and sums gradients in fp32. "no" uses fp32 for both.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (Processes(device).count,))
    dtype = torch.bfloat16 if precision == "bf16" else None
    # Keep the dtype of the inputs: bf16 cannot represent timesteps up to 1000 exactly.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for name in blocks:
        for block in transformer.get_submodule(name).children():
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
