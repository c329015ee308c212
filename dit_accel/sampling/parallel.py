"""`Parallel`: the option `--parallel`, by which several processes compute one sample."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Parallel:
    """Context parallelism of a command: processes that make each sample together."""

    degree: int
    """Number of processes."""
    anything: bool = False
    """Whether heads may be shared unevenly."""

    @property
    def writes(self) -> bool:
        """Whether this process writes files and prints; only the first one does."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def record(self) -> dict[str, Any]:
        """Entry of the sidecar."""
        return {"parallel": {"ulysses_anything" if self.anything else "ulysses": self.degree}}

    def check(self, outline: Any) -> None:
        """Check a pipeline that is not loaded yet.

        Args:
            outline: see `sampling.outline`.

        Raises:
            ValueError: its heads cannot be shared.
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
        """Enable context parallelism on a loaded pipeline, within `processes`."""
        from diffusers import ContextParallelConfig

        from dit_accel.runtime.parallel.enable import enable_parallelism

        config = ContextParallelConfig(ulysses_degree=self.degree, ulysses_anything=self.anything)
        enable_parallelism(pipe, config=config)
        if not self.writes:
            pipe.set_progress_bar_config(disable=True)


def read_parallel(text: str) -> Parallel | None:
    """Read the value of `--parallel`; None: each process works alone.

    Args:
        text: "none", "ulysses:N", or "ulysses_anything:N" for heads that N does not divide.

    Raises:
        ValueError: another text, or there are not N processes.
    """
    if text == "none":
        return None
    accepted = (
        "accepted are none, ulysses:N, and ulysses_anything:N for heads that N does not divide"
    )
    if text.startswith("ring"):
        raise ValueError(
            f"parallel={text!r}: in ring attention no process sees all keys of a head, which acceleration needs; {accepted}"
        )
    found = re.fullmatch(r"(ulysses|ulysses_anything):(\d+)", text)
    if found is None or int(found[2]) < 2:
        raise ValueError(f"parallel={text!r}: {accepted}, with N of 2 or more")
    degree, world = int(found[2]), int(os.environ.get("WORLD_SIZE", "1"))
    if world != degree:
        raise ValueError(
            f"parallel={text!r}: there {'is' if world == 1 else 'are'} {world} process{'es' * (world > 1)}; accepted is "
            f"torchrun --nproc-per-node {degree} -m dit_accel.cli ... --parallel {text}"
        )
    return Parallel(degree, found[1] == "ulysses_anything")


@contextlib.contextmanager
def processes(parallel: Parallel | None, device: str) -> Iterator[None]:
    """Context manager in which the processes of torchrun can send each other tensors.

    Args:
        parallel: None: nothing happens.
        device: as in `devices.device_name`.
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
