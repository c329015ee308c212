"""`Device`: the measured GPU; and `DryDevice`, a stand-in on tensors without memory."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.bench.timing import Functions, peak_gpu_bytes, seconds, summary

Result = dict[str, Any]
# Number of bytes that are written before each timed call. The host gets ahead meanwhile, and the cache is flushed.
FLUSH_BYTES = 2**29


class DeviceLostError(RuntimeError):
    """The device no longer works: after an invalid access, every call of this process fails."""


def first_line(error: BaseException) -> str:
    """Return the type and the first line of the text of an error, at most 300 characters."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


class Device:
    """A CUDA device, with methods that measure functions."""

    dry = False
    place = "cuda"

    def __init__(self) -> None:
        self._flush: Tensor | None = None

    def times(
        self,
        functions: Mapping[str, Callable[[], Any]],
        repeats: int,
        *,
        optional: tuple[str, ...] = (),
    ) -> Result:
        """Time functions in turns.

        Args:
            functions: functions without arguments, by name.
            repeats: number of timed calls of each.
            optional: names of functions that may fail without an error: kernels of other libraries, and tiles that may
                not fit.

        Returns:
            Milliseconds `{"p20", "p50", "p80"}` by name, and under "refused" the errors of failed optional functions.
        """
        refused: dict[str, str] = {}
        ready: Functions = {}
        for name, function in functions.items():
            try:
                function()
                self.wait()
                ready[name] = function
            except DeviceLostError:
                raise
            except Exception as error:
                if name not in optional:
                    raise
                refused[name] = first_line(error)
        found = self._measure(ready, repeats)
        return {**found, **({"refused": refused} if refused else {})}

    def _measure(self, functions: Functions, repeats: int) -> Result:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.place)
        measured = seconds(functions, repeats, self.place, prepare=self._flush.zero_)
        return {
            name: {p: 1000 * x for p, x in summary(values).items()}
            for name, values in measured.items()
        }

    def wait(self) -> None:
        """Wait for the device.

        Raises:
            DeviceLostError: the device reports a permanent error.
        """
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceLostError(first_line(error)) from error

    def graph(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a function in a CUDA graph, and return a function that replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def peak_mib(self, function: Callable[[], Any]) -> float:
        """Return the peak memory that a call allocates in addition to that before, in MiB."""
        return peak_gpu_bytes(function) / 2**20

    def host_us(self, function: Callable[[], Any], calls: int = 20) -> dict[str, float]:
        """Return the host time of a call in microseconds, without device time."""
        function()
        found = []
        for _ in range(calls):
            self.wait()  # a full queue would make the host wait inside the call
            start = time.perf_counter()
            function()
            found.append(1e6 * (time.perf_counter() - start))
        self.wait()
        return summary(found)

    def profile(self, function: Callable[[], Any]) -> list[list[Any]]:
        """Return `[kernel, calls, microseconds]` of every kernel of a call, in descending order of time."""
        from torch.profiler import ProfilerActivity, profile

        function()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
            self.wait()
        rows = sorted(profiler.key_averages(), key=lambda x: -x.device_time_total)
        return [[x.key[:90], x.count, round(x.device_time_total, 1)] for x in rows[:30]]

    def number(self, value: Callable[[], Any]) -> float:
        """Read a number from the device."""
        return float(value())

    def forget(self) -> None:
        """Free the memory of the previous sub-step."""
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """Context manager in which newly allocated memory is filled with NaN (integers: with their largest number)."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        # True is torch's default, but other code may have changed it.
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            torch.use_deterministic_algorithms(before)


class DryDevice(Device):
    """Stand-in for a device: every function runs once on meta tensors. Times and numbers are placeholders."""

    dry = True
    place = "meta"

    def _measure(self, functions: Functions, repeats: int) -> Result:
        return {name: dict.fromkeys(("p20", "p50", "p80"), 1.0) for name in functions}

    def wait(self) -> None:
        pass

    def graph(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return function

    def peak_mib(self, function: Callable[[], Any]) -> float:
        function()
        return 1.0

    def host_us(self, function: Callable[[], Any], calls: int = 20) -> dict[str, float]:
        function()
        return dict.fromkeys(("p20", "p50", "p80"), 1.0)

    def profile(self, function: Callable[[], Any]) -> list[list[Any]]:
        function()
        return []

    def number(self, value: Callable[[], Any]) -> float:
        return 1.0

    def forget(self) -> None:
        pass

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        yield
