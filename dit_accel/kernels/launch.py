"""One Triton launch as data: run it, or compile it for a chip that is not here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package


def runs_here(x: Tensor) -> bool:
    """Return whether Triton kernels are the default for `x`: on a GPU, not for fp64, if triton is installed."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton_package()


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is called with."""

    kernel: Any
    """The `@triton.jit` function."""
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    """Run-time arguments by name; None stands for an input that this launch does not have."""
    constants: dict[str, int | bool | str]
    """`tl.constexpr` arguments by name."""
    num_warps: int
    num_stages: int

    def __call__(self) -> None:
        first: Any = next(filter(torch.is_tensor, self.arguments.values()))
        # Triton launches on the current device, not on the tensors'.
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(first):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        # As kernel[grid](...), which would copy the arguments once more.
        self.kernel.run(
            grid=self.grid,
            warmup=False,
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )
