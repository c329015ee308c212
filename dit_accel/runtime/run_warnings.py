"""`RunWarnings`: warnings about runs in which methods have nothing to do, or did nothing."""

import warnings
from collections.abc import Iterable, Mapping

from dit_accel.runtime.method import Method
from dit_accel.runtime.run import Run


class RunWarnings:
    """Warnings of one installation. Each combination of reasons is warned about once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def at_first_call(self, run: Run, methods: Mapping[str, Method]) -> None:
        """Warn if the schedule leaves methods nothing to do. Later calls of the run do nothing."""
        if run.unscheduled is not None:
            return
        found = {x.name: why for x in methods.values() if (why := x.unscheduled(run))}
        run.unscheduled = set(found)
        if self._is_new(f"{name}: {reason}" for name, (reason, _) in found.items()):
            text = "; ".join(f"{name}: {x} ({numbers})" for name, (x, numbers) in found.items())
            warnings.warn(
                f"dit_accel: the schedule of this run leaves nothing to do for {text}", stacklevel=2
            )

    def at_last_step(self, run: Run, methods: Mapping[str, Method]) -> None:
        """Warn if no method accelerated anything. Later calls of the run do nothing."""
        if run.idle_checked:
            return
        run.idle_checked = True
        why = {x.name: reason for x in methods.values() if (reason := x.idle(run))}
        unscheduled = run.unscheduled or set()
        new = [f"{name}: {reason}" for name, reason in why.items() if name not in unscheduled]
        if len(why) == len(methods) and self._is_new(new):
            warnings.warn(
                f"dit_accel accelerated nothing in this run ({'; '.join(new)})", stacklevel=2
            )

    def _is_new(self, reasons: Iterable[str]) -> bool:
        """Return whether there are reasons and this combination of them was not warned about before."""
        text = "; ".join(reasons)
        if not text or text in self._given:
            return False
        self._given.add(text)
        return True
