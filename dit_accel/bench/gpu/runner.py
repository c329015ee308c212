"""Runner of sub-steps within a time budget. A failure ends only one sub-step."""

import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dit_accel.bench.gpu.device import Device, DeviceLostError, Result, first_line
from dit_accel.bench.gpu.journal import Journal, SubStep
from dit_accel.bench.timing import gpu_clocks

# Share of the measured peak that estimates assume for attention, low enough for a slow kernel.
SHARE_OF_PEAK = 0.3


class Stopped(BaseException):
    """The process received a signal to stop."""


def estimate(sub_step: SubStep, results: dict[str, Result]) -> float:
    """Return the estimated seconds of a sub-step, from the measured peak if it is known."""
    peak = results.get("ceilings/matmul", {}).get("tflops")
    return sub_step.seconds + (sub_step.flops / (SHARE_OF_PEAK * 1e12 * peak) if peak else 0.0)


def run_all(
    sub_steps: Iterable[SubStep],
    device: Device,
    journal: Journal,
    *,
    left: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """Run all unfinished sub-steps in order.

    Args:
        sub_steps: sub-steps to run.
        device: device to measure.
        journal: journal that stores the results.
        left: function that returns the remaining seconds of the budget.
        say: function that prints a line.

    Raises:
        DeviceLostError: the device no longer works; the sub-step is marked as crashed.
        Stopped: the process received a signal to stop; the sub-step is not marked.
    """
    sub_steps = list(sub_steps)
    step = None
    for i, sub_step in enumerate(sub_steps, 1):
        if sub_step.id in journal.data["steps"]:
            continue
        if step != sub_step.step and not device.dry:
            step = sub_step.step
            journal.data.setdefault("clocks", []).append({"before": step, **(gpu_clocks() or {})})
        seconds, remaining = estimate(sub_step, journal.results()), left()
        label = f"[{i}/{len(sub_steps)}, {remaining:4.0f} s left] {sub_step.id}"
        if seconds > remaining:
            journal.end(
                sub_step.id,
                "skipped",
                reason=f"needs about {seconds:.0f} s, {remaining:.0f} s left",
            )
            say(f"{label}: skipped, needs about {seconds:.0f} s")
            continue
        journal.begin(sub_step, limit_s=min(max(60.0, 6 * seconds), remaining + 30))
        start = time.monotonic()

        def took(start: float = start) -> float:
            return round(time.monotonic() - start, 2)

        try:
            torch.manual_seed(0)
            result = sub_step.run(device, journal.results())
            device.wait()
        except DeviceLostError as error:
            journal.end(sub_step.id, "crashed", seconds=took(), error=first_line(error))
            say(f"{label}: the device is lost: {first_line(error)}")
            raise
        except Stopped:
            journal.pause()
            raise
        except Exception as error:
            _end_failed(journal, device, sub_step, error, took())
            say(f"{label}: FAILED: {first_line(error)}")
        else:
            journal.end(sub_step.id, "done", seconds=took(), result=result)
            say(f"{label}: {took():.1f} s{headline(result)}")
        device.forget()


def _end_failed(
    journal: Journal, device: Device, sub_step: SubStep, error: Exception, seconds: float
) -> None:
    where = [f"{x.name}:{x.lineno}" for x in traceback.extract_tb(error.__traceback__)][-4:]
    text = first_line(error)
    try:
        device.wait()
    except DeviceLostError:
        journal.end(sub_step.id, "crashed", seconds=seconds, error=text, where=where)
        raise
    journal.end(sub_step.id, "failed", seconds=seconds, error=text, where=where)


def headline(result: Result) -> str:
    """Return the part of a result that is shown in a progress line."""
    shown: dict[str, Any] = {n: x for n, x in result.items() if isinstance(x, int | float | bool)}
    parts = [f"{n} {x:.4g}" if isinstance(x, float) else f"{n} {x}" for n, x in shown.items()]
    return ": " + ", ".join(parts[:6]) if parts else ""


@contextmanager
def stops_on_signal() -> Iterator[None]:
    """Context manager in which SIGTERM and SIGINT raise `Stopped`."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(f"signal {number}")

    before = {x: signal.signal(x, stop) for x in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
