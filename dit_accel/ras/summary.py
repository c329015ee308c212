"""`RASSummary`: summary of region-adaptive sampling in one run."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dit_accel.runtime.summary import PartSummary, joined_config, reasons, table, total


@dataclass(frozen=True)
class StepSummary:
    """Summary of one step."""

    step: int
    """Index of the step."""
    mode: str
    """"dense"; "partial" if a call ran on some of the tokens; "forecast" if the transformer did not run."""
    active: int
    """Number of image tokens that ran."""
    tokens: int
    """Number of image tokens in all. 1 in runs without partial steps, which do not count tokens."""
    dense_calls: dict[str, int]
    """Number of calls on all tokens, by reason."""
    oldest: int
    """Largest number of steps since a token's last update."""
    cost: float
    """FLOPs of the step divided by the FLOPs of a step of the plain pipeline, both counted with dense attention."""


@dataclass(frozen=True)
class RASSummary:
    """Summary of region-adaptive sampling in the last run."""

    config: dict[str, Any]
    """Settings."""
    steps: list[StepSummary]
    kv_predictor: str
    """Predictor of keys and values that was used: "linear" or "hold"."""
    kv_bytes: int
    """Largest number of bytes of cached keys and values, all contexts together."""

    @classmethod
    def joined(cls, parts: Mapping[str, PartSummary]) -> "RASSummary":
        """Return the summary of two transformers together, with steps numbered over the whole run.

        Steps of a transformer without region-adaptive sampling are dense.
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
            # The caches of the first transformer are freed before the second one runs.
            max(one.kv_bytes for one in on.values()),
        )

    @property
    def ras_steps(self) -> int:
        """Number of partial and forecast steps."""
        return sum(step.mode != "dense" for step in self.steps)

    @property
    def forecast_steps(self) -> int:
        """Number of steps in which the transformer did not run."""
        return sum(step.mode == "forecast" for step in self.steps)

    @property
    def cost(self) -> float:
        """Cost of the run in dense steps, by counted FLOPs."""
        return sum(step.cost for step in self.steps)

    @property
    def mean_cost(self) -> float | None:
        """Mean cost of a step, in dense steps; None before a run."""
        return self.cost / len(self.steps) if self.steps else None

    @property
    def dense_calls(self) -> dict[str, int]:
        """Number of calls on all tokens, by reason."""
        return total(step.dense_calls for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
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
        """Numbers of steps, cost and memory of the run as one line; empty before a run."""
        if not self.steps:
            return ""
        modes = Counter(x.mode for x in self.steps)
        kept = "none"
        if self.kv_bytes:
            kept = f"{self.kv_predictor}, {self.kv_bytes / 2**20:.1f} MiB"
        kinds = ", ".join(f"{n} {mode}" for mode, n in modes.items())
        return f"{len(self.steps)} steps: {kinds}; cost of {self.cost:.2f} dense steps, cached keys and values: {kept}"
