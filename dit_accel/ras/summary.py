"""`RASSummary`: what region-adaptive sampling did in one run."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dit_accel.runtime.summary import PartSummary, joined_config, reasons, table, total


@dataclass(frozen=True)
class StepSummary:
    """One step under region-adaptive sampling."""

    step: int
    mode: str
    """"dense", "partial" if a call left tokens out, or "forecast" if every call was left out."""
    active: int
    """Image tokens that ran."""
    tokens: int
    """Image tokens in all. 1 stands for all of them where a run has no partial steps: they are not counted then."""
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

    @classmethod
    def joined(cls, parts: Mapping[str, PartSummary]) -> "RASSummary":
        """Return the summary of two transformers together; the steps of one without region-adaptive sampling are dense.

        Steps are numbered as those of the whole run.
        """
        on: dict[str, RASSummary] = {
            k: x.methods["ras"] for k, x in parts.items() if "ras" in x.methods
        }
        known = [step for one in on.values() for step in one.steps]
        steps: list[StepSummary] = []
        begin = 0
        for name, part in parts.items():
            if name in on:
                steps += [replace(x, step=begin + x.step) for x in on[name].steps]
            elif known:
                dense = StepSummary(
                    0, "dense", known[0].tokens, known[0].tokens, {"off": 1}, 0, 1.0
                )
                steps += [replace(dense, step=begin + i) for i in range(part.steps)]
            begin += part.steps
        return cls(
            joined_config({name: one.config for name, one in on.items()}, parts),
            steps,
            ", ".join(dict.fromkeys(one.kv_predictor for one in on.values())),
            # The first transformer gives its memory back before the second one runs.
            max(one.kv_bytes for one in on.values()),
        )

    @property
    def ras_steps(self) -> int:
        """Steps in which a call left tokens out, or was left out."""
        return sum(step.mode != "dense" for step in self.steps)

    @property
    def forecast_steps(self) -> int:
        """Steps in which the transformer was not called."""
        return sum(step.mode == "forecast" for step in self.steps)

    @property
    def cost(self) -> float:
        """Steps of a dense run that would cost as much, by counted FLOPs."""
        return sum(step.cost for step in self.steps)

    @property
    def mean_cost(self) -> float | None:
        """Cost of a step, averaged over the run: 1 is a dense one. None before a run."""
        return self.cost / len(self.steps) if self.steps else None

    @property
    def dense_calls(self) -> dict[str, int]:
        """Calls on all tokens, by reason."""
        return total(step.dense_calls for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "ras_steps": self.ras_steps,
            "forecast_steps": self.forecast_steps,
            "cost": self.cost,
            "mean_cost": self.mean_cost,
            "dense_calls": self.dense_calls,
        }

    def __str__(self) -> str:
        if not self.steps:
            return "region-adaptive sampling: no run yet"
        rows: list[tuple[str, ...]] = [("step", "mode", "active", "oldest", "cost", "why dense")]
        for x in self.steps:
            active = {0: "none", x.tokens: "all"}.get(x.active, f"{x.active} of {x.tokens}")
            cost = f"{x.cost:.3f}"
            rows.append((str(x.step), x.mode, active, str(x.oldest), cost, reasons(x.dense_calls)))
        rows.append((self.totals,))
        return table(rows)

    @property
    def totals(self) -> str:
        """Kinds of steps, cost and memory of the run, as one line; empty before a run."""
        if not self.steps:
            return ""
        modes = Counter(x.mode for x in self.steps)
        kept = "none"
        if self.kv_bytes:
            kept = f"{self.kv_predictor}, {self.kv_bytes / 2**20:.1f} MiB"
        kinds = ", ".join(f"{n} {mode}" for mode, n in modes.items())
        return f"{len(self.steps)} steps: {kinds}; cost of {self.cost:.2f} dense steps, cached keys and values: {kept}"
