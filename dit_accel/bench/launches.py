"""Number of operations that a sparse attention call starts on a GPU, counted without a GPU, and time of its Python code."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels import Geometry, SparsePlan, block_scores, sparse_linear_attention
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.operators import BODIES

ROUTERS: dict[str, dict[str, Any]] = {"mean": {"spread": False}, "spread": {"spread": True}}
MODES: dict[str, dict[str, Any]] = {
    "none": {"combine": "none"},
    "proj all": {"combine": "proj", "linear_scope": "all"},
    "shared_softmax": {"combine": "shared_softmax"},
    "complement": {"combine": "proj", "linear_scope": "complement"},
    "marginal": {"combine": "proj", "linear_scope": "marginal"},
    "alpha": {"combine": "alpha", "linear_scope": "complement"},
}
# Largest number of launches of a whole call at inference, by mode.
BOUNDS = {"none": 6, "proj all": 8, "shared_softmax": 10, "complement": 10}
HOST_BOUND_US = 150.0
"""Largest time of the Python code of a whole call with `combine="none"`, in microseconds."""


@dataclass(frozen=True)
class Shape:
    """Sizes of q, k and v, and block sizes. Default: Wan 2.1 1.3B, a clip of 81 frames at 480 x 832."""

    batch: int = 1
    heads: int = 12
    length: int = 32760
    head_dim: int = 128
    block_q: int = 128
    block_k: int = 64
    topk: float = 0.05


@dataclass
class Started:
    """Operations that a call starts on a device, in order."""

    ops: list[str] = field(default_factory=list)
    """Torch operators that run on the device, without allocations and views."""
    launches: list[str] = field(default_factory=list)
    """Triton kernels."""
    syncs: list[str] = field(default_factory=list)
    """Operations that wait for the device or copy between devices, which a CUDA graph cannot capture."""

    @property
    def total(self) -> int:
        """Number of operators and kernels."""
        return len(self.ops) + len(self.launches)


class HostSync(Exception):
    """Exception: a call reads a number from the device."""


class _Recorder(TorchDispatchMode):
    """Dispatch mode that records every torch operator, and enters the operators of the package."""

    def __init__(self, started: Started) -> None:
        super().__init__()
        self.started = started

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "dit_accel":
            body = BODIES.get(name) or OPDEFS[f"dit_accel::{name}"]._init_fn
            with self:
                return body(*args, **kwargs)
        with self:  # composite operators such as aten.to, which may or may not copy
            whole = func.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        if _waits(func, name, args, kwargs):
            self.started.syncs.append(name)
            raise HostSync(name)
        if not _is_free(func, name):
            self.started.ops.append(name)
        return func(*args, **kwargs)


def _waits(func: Any, name: str, args: tuple, kwargs: dict) -> bool:
    tensors = [x for x in args if isinstance(x, Tensor)]
    if name in ("_to_copy", "copy_"):
        there = {x.device.type for x in tensors if x.ndim or x.device.type != "cpu"}
        if kwargs.get("device") is not None:
            there.add(torch.device(kwargs["device"]).type)
        return len(there) > 1
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = (x for x in args[1] if x is not None)
        return any(x.dtype in (torch.bool, torch.uint8) for x in masks)
    tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
    return any(tag in func.tags for tag in tags)


def _is_free(func: Any, name: str) -> bool:
    """Return whether an operator runs nothing on the device: an allocation, or a view."""
    if "empty" in name or name == "_unsafe_view":
        return True
    aliases = [r.alias_info for r in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


@contextlib.contextmanager
def as_on_a_gpu(launch: Callable[[str], None]) -> Iterator[None]:
    """Context manager in which calls take the code path of an H100 on tensors of any device. Kernels do not run.

    Args:
        launch: function that is called with the name of each Triton kernel instead.
    """
    from triton.runtime.jit import JITFunction

    replaced = {"runs_here": lambda x: True, "reads_freely": lambda x: False}
    modules = [m for n, m in sys.modules.items() if n.startswith("dit_accel.kernels")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, function in replaced.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, function))
        target = Target("cuda", "90")
        # A plain function, because a mock takes 10 us per call.
        stack.enter_context(mock.patch.object(Target, "of", lambda device: target))  # noqa: PT008

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            launch(self.fn.__name__)

        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        yield


@contextlib.contextmanager
def recording() -> Iterator[Started]:
    """Context manager that yields a record of the operations that calls on "meta" tensors would start on a GPU.

    The first operation that waits for the device ends the call. Operators of the package run as on a GPU, without their
    kernels.
    """
    started = Started()
    make = torch.tensor

    def tensor(data: Any, **options: Any) -> Tensor:
        if torch.device(options.get("device") or "cpu").type == "cpu":
            return make(data, **options)
        started.syncs.append("tensor")  # copies to the device, which no operator shows
        raise HostSync("tensor")

    patched = mock.patch.object(torch, "tensor", tensor)
    with (
        patched,
        as_on_a_gpu(started.launches.append),
        _Recorder(started),
        contextlib.suppress(HostSync),
    ):
        yield started


def sparse_call(
    shape: Shape, mode: str, router: str, device: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return two functions: a whole call, from q, k and v to the output, and its router and plan alone."""
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    q, k, v = (
        torch.empty(size, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(3)
    )
    blocks: dict[str, Any] = {"block_q": shape.block_q, "block_k": shape.block_k}
    geometry = Geometry.of(device, q_len=shape.length, kv_len=shape.length, **blocks)
    tally = torch.zeros(3, dtype=torch.int64, device=device)
    options = dict(MODES[mode])
    if options["combine"] == "proj":
        d = shape.head_dim
        options["proj_weight"] = torch.zeros(d, d, dtype=torch.float32, device=device)
        options["proj_bias"] = torch.zeros(d, dtype=torch.float32, device=device)
    if options["combine"] == "alpha":
        options["alpha"] = torch.zeros(shape.heads, dtype=torch.float32, device=device)
    skip = 0.1 if mode == "marginal" else 0.0

    def plan() -> SparsePlan:
        scores = block_scores(q, k, **blocks, **ROUTERS[router])
        return SparsePlan.from_scores(
            scores, topk=shape.topk, skip=skip, geometry=geometry, tally=tally
        )

    @torch.no_grad()
    def call() -> Tensor:
        return sparse_linear_attention(q, k, v, plan(), **options)

    return call, plan


def count(shape: Shape, mode: str, router: str) -> tuple[Started, Started]:
    """Return the operations of a whole call, and those of its router and plan."""
    found = []
    for function in sparse_call(shape, mode, router, "meta"):
        with recording() as started:
            function()
        found.append(started)
    return found[0], found[1]


def host_time(mode: str, router: str, *, calls: int = 300) -> float:
    """Return the median time of the Python code of a whole call in microseconds, without kernels.

    Tensors are small and on a CPU. Torch operators run.
    """
    function, _ = sparse_call(Shape(length=2048), mode, router, "cpu")
    seconds = []
    with as_on_a_gpu(lambda name: None):
        for _ in range(calls):
            start = time.thread_time()
            function()
            seconds.append(time.thread_time() - start)
    return statistics.median(seconds) * 1e6
