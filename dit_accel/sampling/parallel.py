"""The option `--parallel`: several processes compute each sample together."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Parallel:
    """Settings of context parallelism for a command."""

    degree: int
    """Number of processes."""
    anything: bool = False
    """True if the number of heads need not be divisible by `degree`."""

    @property
    def writes(self) -> bool:
        """True if this process writes files and prints; only the first process does."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def record(self) -> dict[str, Any]:
        """Entry for the sidecar."""
        return {"parallel": {"ulysses_anything" if self.anything else "ulysses": self.degree}}

    def check(self, outline: Any) -> None:
        """Check a pipeline before it is loaded.

        Args:
            outline: outline of the pipeline, see `sampling.outline`.

        Raises:
            ValueError: the heads cannot be divided among the processes.
        """
        from accelerate import init_empty_weights

        from dit_accel.models import family_of
        from dit_accel.runtime.parallel.group import Group

        with init_empty_weights():
            transformer = outline.transformer_class.from_config(vars(outline.transformer.config))
        group = Group(None, 0, self.degree, self.anything)
        for name, layer in family_of(transformer).self_attention(transformer).items():
            group.check_heads(name, layer.kv_heads)

    def enable(self, pipe: Any) -> None:
        """Enable context parallelism on a loaded pipeline, inside the context manager `processes`."""
        from diffusers import ContextParallelConfig

        from dit_accel.runtime.parallel.enable import enable_parallelism

        config = ContextParallelConfig(ulysses_degree=self.degree, ulysses_anything=self.anything)
        enable_parallelism(pipe, config=config)
        if not self.writes:
            pipe.set_progress_bar_config(disable=True)


def read_parallel(text: str) -> Parallel | None:
    """Return the settings of the value of `--parallel`, or None for "none".

    Args:
        text: "none", "ulysses:N", or "ulysses_anything:N" for a number of heads that N does not divide.

    Raises:
        ValueError: the value is invalid, or the number of processes is not N.
    """
    if text == "none":
        return None
    accepted = "must be none, ulysses:N, or ulysses_anything:N for a number of heads that N does not divide"
    if text.startswith("ring"):
        raise ValueError(
            f"parallel={text!r}: ring attention is not supported, because acceleration needs all keys of a head in one process; {accepted}"
        )
    found = re.fullmatch(r"(ulysses|ulysses_anything):(\d+)", text)
    if found is None or int(found[2]) < 2:
        raise ValueError(f"parallel={text!r}: {accepted}, with N >= 2")
    degree, world = int(found[2]), int(os.environ.get("WORLD_SIZE", "1"))
    if world != degree:
        raise ValueError(
            f"parallel={text!r}: WORLD_SIZE is {world}, must be {degree}; run "
            f"torchrun --nproc-per-node {degree} -m dit_accel.cli ... --parallel {text}"
        )
    return Parallel(degree, found[1] == "ulysses_anything")


@contextlib.contextmanager
def processes(parallel: Parallel | None, device: str) -> Iterator[None]:
    """Context manager that initialises `torch.distributed` for the processes of torchrun.

    Args:
        parallel: settings of context parallelism. None: do nothing.
        device: device of this process, as in `devices.device_name`.
    """
    if parallel is None:
        yield
        return
    from dit_accel.sampling.devices import device_name

    name = device_name(device)
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    backend = "cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
