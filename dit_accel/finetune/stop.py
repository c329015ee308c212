"""`StopRequest`: handle SIGTERM and SIGINT during a run, so that it saves a checkpoint and exits with code 0."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class CutShort(Exception):
    """Exception that stops sampling after a signal was received."""


class Interrupted(SystemExit):
    """Exception that ends a run after a signal was received and the run was saved.

    It is a `SystemExit` with code 0, so a program that does not catch it exits successfully.

    Args:
        signal_name: name of the signal, such as "SIGTERM".
        checkpoint: folder of the checkpoint from which the run can resume. None if there is no checkpoint yet.
    """

    def __init__(self, signal_name: str, checkpoint: Path | None) -> None:
        super().__init__(0)
        self.signal_name = signal_name
        self.checkpoint = checkpoint
        """Folder of the checkpoint from which the run can resume; None if it restarts from the beginning."""

    def __str__(self) -> str:
        if self.checkpoint is None:
            return f"stopped by {self.signal_name} before the first checkpoint; the next start begins from step 0"
        return f"stopped by {self.signal_name}; resume_from_checkpoint='latest' continues from {self.checkpoint}"


class StopRequest:
    """Context manager that records SIGTERM and SIGINT instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. A signal that the process already ignores stays ignored, such
    as SIGINT in a background job of a shell. Outside of the main thread signals are not recorded, because Python
    handles signals only there.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the received signal; None before a signal is received."""
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
