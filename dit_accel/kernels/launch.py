"""`Launch`: one Triton launch as data. Call it to run the kernel; `aot.py` compiles it for any chip."""

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
    """A kernel with its grid, arguments, constants and launch options."""

    kernel: Any
    """The `@triton.jit` function."""
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    """Run-time arguments by name; None: this launch does not have the input."""
    constants: dict[str, int | bool | str]
    """`tl.constexpr` arguments by name."""
    num_warps: int
    num_stages: int

    def __call__(self) -> None:
        first: Any = next(filter(torch.is_tensor, self.arguments.values()))
        # Triton launches on the current device, not on the device of the tensors.
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(first):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        # Equivalent to kernel[grid](...), without its copy of the arguments.
        self.kernel.run(
            grid=self.grid,
            warmup=False,
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )
