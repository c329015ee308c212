"""Recorder of the Triton launches of any code, to repeat, vary or compile them."""

import contextlib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import dit_accel.kernels
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.launch import Launch

# Dispatch key of operators that have one function for every device.
BODY = torch._C.DispatchKey.CompositeExplicitAutograd


@dataclass(frozen=True)
class HeldLaunch:
    """Kernel launch with its tensors. Calling it launches the kernel again."""

    kernel: Any
    """The `@triton.jit` function."""
    grid: tuple[int, ...]
    keywords: dict[str, Any]
    """Arguments, constants and launch options by name."""

    def __call__(self) -> None:
        self.kernel[self.grid](**self.keywords)

    @property
    def name(self) -> str:
        """Name of the kernel, without the suffix `_kernel`."""
        return self.kernel.__name__.removesuffix("_kernel")

    def changed(self, grid: tuple[int, ...] | None = None, **keywords: Any) -> "HeldLaunch":
        """Return the launch with another grid, or other arguments, constants or options."""
        return replace(self, grid=grid or self.grid, keywords={**self.keywords, **keywords})

    def sketch(self) -> "Sketch":
        """Return the data that determine the compiled code, without tensors."""
        arguments, constants, options = {}, {}, {}
        # Functions in Triton's interpreter have no `params`.
        signature = inspect.signature(self.kernel.fn).parameters
        kinds = {name: "constexpr" in str(p.annotation) for name, p in signature.items()}
        for name, value in self.keywords.items():
            if name not in kinds:
                options[name] = value
            elif kinds[name]:
                constants[name] = value
            else:
                arguments[name] = value.dtype if isinstance(value, Tensor) else value
        module = self.kernel.fn.__module__
        return Sketch(module, self.kernel.__name__, self.grid, arguments, constants, options)


class Sketch(NamedTuple):
    """A launch as plain data that can be sent to other processes. Dtypes stand in for tensors."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def key(self) -> tuple:
        """Return the values that Triton specialises on. Launches with equal keys have the same compiled kernel."""
        arguments = tuple((name, _special(x)) for name, x in sorted(self.arguments.items()))
        constants = (tuple(sorted(x.items())) for x in (self.constants, self.options))
        return (self.module, self.kernel, arguments, *constants)

    def launch(self) -> Launch:
        """Return the launch on tensors without memory."""
        arguments = {
            name: torch.empty(0, dtype=x, device="meta") if isinstance(x, torch.dtype) else x
            for name, x in self.arguments.items()
        }
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return Launch(
            kernel=kernel,
            grid=self.grid,
            arguments=arguments,
            constants=self.constants,
            num_warps=self.options["num_warps"],
            num_stages=self.options["num_stages"],
        )


def _special(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return "one" if value == 1 else (value % 16 == 0, -(2**31) <= value < 2**31)
    return "float" if isinstance(value, float) else value


@contextlib.contextmanager
def launches(*, run: bool = True) -> Iterator[list[HeldLaunch]]:
    """Context manager that yields a list, to which every Triton launch of its block is appended.

    Args:
        run: also launch the kernels.
    """
    held: list[HeldLaunch] = []
    kind: Any = JITFunction
    if os.environ.get("TRITON_INTERPRET") == "1":
        kind = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    original = kind.run

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        held.append(HeldLaunch(kernel, grid, {**named, **keywords}))
        if run:
            return original(kernel, *arguments, grid=grid, warmup=warmup, **keywords)
        return None

    with mock.patch.object(kind, "run", record):
        yield held


class _RunBodies(TorchDispatchMode):
    """Dispatch mode that runs the operators of the package on meta tensors, in place of their fakes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "dit_accel":
            return func(*args, **(kwargs or {}))
        with self:  # operators call each other
            return func._op_dk(BODY, *args, **(kwargs or {}))


def _takes_triton(x: Tensor) -> bool:
    return x.is_meta and x.dtype != torch.float64


@contextlib.contextmanager
def without_device(target: Target) -> Iterator[list[HeldLaunch]]:
    """Context manager that yields the launches of its block on `target`. Meta tensors count as tensors of this device.

    No kernel runs, so code that reads numbers from tensors fails in the block.
    """
    for found in pkgutil.walk_packages(dit_accel.kernels.__path__, "dit_accel.kernels."):
        # Modules are imported before, because a first import inside the block would keep the patched functions.
        if not found.name.endswith((".aot", ".catalogue")):
            importlib.import_module(found.name)
    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith("dit_accel.kernels") and hasattr(module, "runs_here")
    ]
    with contextlib.ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "runs_here", _takes_triton))
        stack.enter_context(mock.patch.object(Target, "of", return_value=target))
        stack.enter_context(_RunBodies())
        yield stack.enter_context(launches(run=False))
