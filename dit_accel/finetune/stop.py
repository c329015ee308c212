"""`StopRequest`: a signal asks the run to save and end; `Interrupted` ends it with exit code 0, `CutShort` the making of
samples."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class CutShort(Exception):
    """A signal asked the run to end while samples were made."""


class Interrupted(SystemExit):
    """The run was asked to end, and has saved what it can go on from.

    It is a `SystemExit` with code 0: a program that does not catch it ends as one that has finished.
    """

    def __init__(self, signal_name: str, checkpoint: Path | None) -> None:
        super().__init__(0)
        self.signal_name = signal_name
        self.checkpoint = checkpoint
        """Where the run goes on from; None: from its beginning."""

    def __str__(self) -> str:
        if self.checkpoint is None:
            return f"ended by {self.signal_name} before the first checkpoint; started again, the run begins anew"
        return f"ended by {self.signal_name}; resume_from_checkpoint='latest' goes on from {self.checkpoint}"


class StopRequest:
    """Context manager that notes SIGTERM and SIGINT instead of dying of them.

    A second SIGINT interrupts at once, as without it. A signal that the process ignores, as SIGINT in a
    background job of a shell, stays ignored. Outside of the main thread, where Python handles no signals, it notes
    nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal that has come; None: none."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
