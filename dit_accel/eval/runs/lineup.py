"""`line_up`: the methods that an evaluation compares, checked before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.runs.methods import DENSE, Crossover, Method, check_methods, read_methods


@dataclass(frozen=True)
class Lineup:
    """Methods of one evaluation."""

    runnable: list[Method]
    """Dense sampling, and the accelerated methods that can run here."""
    fewer: list[Method]
    """Dense sampling with fewer steps; one without a number stands for those at equal time."""
    accelerated: list[Method]
    """Accelerated methods in the caller's order, with those that cannot run here."""
    settings: dict[str, dict[str, Any]]
    """Settings of the methods by name, as rows show them."""
    steps: int
    """Steps of dense sampling."""

    def rows(self, fewer: Sequence[Method]) -> list[Method]:
        """Return the methods in the order of the table.

        Args:
            fewer: dense methods with fewer steps, as measured.
        """
        return [DENSE, *fewer, *self.accelerated]


def line_up(
    methods: Sequence[str | Method],
    pipe: Any,
    *,
    steps: int,
    sla: SLAConfig | SLACheckpoint | dict | str = "balanced",
    ras: RASConfig | str = "balanced",
    crossover: Crossover | None = None,
) -> Lineup:
    """Read the methods and put each of them on once.

    Args:
        methods, sla, ras, crossover: as in `methods.read_methods`.
        pipe: a loaded pipeline without acceleration.
        steps: number of steps of dense sampling.

    Raises:
        ValueError: an unknown or bad method, or acceleration that is on already.
    """
    chosen = read_methods(methods, pipe, sla=sla, ras=ras, crossover=crossover)
    fewer = [x for x in chosen if x.kind == "fewer_steps"]
    runnable = [x for x in chosen if x.why is None and x.kind != "fewer_steps"]
    settings = check_methods(pipe, [*runnable, *fewer], steps)
    accelerated = [x for x in chosen if x.kind not in ("dense", "fewer_steps")]
    return Lineup(runnable, fewer, accelerated, settings, steps)
