"""`RASSummary`: what region-adaptive sampling did in one run."""

from dataclasses import asdict, dataclass
from typing import Any

from dit_accel.runtime.summary import reasons, table, total


@dataclass(frozen=True)
class StepSummary:
    """One step under region-adaptive sampling."""

    step: int
    mode: str
    """"ras" if a call left tokens out, else "dense"."""
    active: int
    """Image tokens that ran."""
    tokens: int
    """Image tokens in all."""
    dense_calls: dict[str, int]
    """Calls on all tokens, by reason."""
    oldest: int
    """Most steps any token has gone without an update."""
    cost: float
    """FLOPs that ran over those of a step of the plain pipeline, with dense attention in both."""


@dataclass(frozen=True)
class RASSummary:
    """Region-adaptive sampling in the last run."""

    config: dict[str, Any]
    steps: list[StepSummary]
    kv_predictor: str
    """"linear" or "hold", as it was used."""
    kv_bytes: int
    """Most that cached keys and values took, all contexts together."""

    @property
    def ras_steps(self) -> int:
        """Steps in which a call left tokens out."""
        return sum(step.mode == "ras" for step in self.steps)

    @property
    def cost(self) -> float:
        """Steps of a dense run that would cost as much, by counted FLOPs."""
        return sum(step.cost for step in self.steps)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Calls on all tokens, by reason."""
        return total(step.dense_calls for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "ras_steps": self.ras_steps,
            "cost": self.cost,
            "dense_calls": self.dense_calls,
        }

    def __str__(self) -> str:
        if not self.steps:
            return "region-adaptive sampling: no run yet"
        rows: list[tuple[str, ...]] = [("step", "mode", "active", "oldest", "cost", "why dense")]
        for x in self.steps:
            active, cost = f"{x.active} of {x.tokens}", f"{x.cost:.3f}"
            rows.append((str(x.step), x.mode, active, str(x.oldest), cost, reasons(x.dense_calls)))
        kept = "none"
        if self.kv_bytes:
            kept = f"{self.kv_predictor}, {self.kv_bytes / 2**20:.1f} MiB"
        rows.append(
            (
                f"{self.ras_steps} of {len(self.steps)} steps region-adaptive, cost of {self.cost:.2f} dense steps, "
                f"cached keys and values: {kept}",
            )
        )
        return table(rows)
