"""`Summary`: summaries of all methods for the last run, and helpers that print tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.models import family_of, is_supported
from dit_accel.runtime.caller import scheduler_of
from dit_accel.runtime.components import TRANSFORMERS, parts_of
from dit_accel.runtime.install import installations_of
from dit_accel.runtime.run import Run
from dit_accel.runtime.target import transformer_of


@dataclass(frozen=True)
class Summary:
    """Summaries of the methods on a transformer for the last run; prints as tables."""

    methods: Mapping[str, Any] = field(default_factory=dict)
    """Summary of each method that is on, by name. For two transformers: summaries of both together."""
    parts: Mapping[str, "Summary"] = field(default_factory=dict)
    """Summary of each transformer, by name, for a pipeline with two; else empty."""

    @property
    def enabled(self) -> bool:
        """True if any method is on."""
        return bool(self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {name: x.to_dict() for name, x in self.methods.items()}
        if self.parts:
            values["transformers"] = {name: x.to_dict() for name, x in self.parts.items()}
        return values

    def __str__(self) -> str:
        if not self.enabled:
            return "acceleration is off"
        tables = [str(x) for x in self.methods.values()]
        if self.parts:
            tables = [f"{name}\n\n{part}" for name, part in self.parts.items()]
            totals = (x.totals for x in self.methods.values() if hasattr(x, "totals"))
            tables += [f"both transformers: {x}" for x in totals if x]
        return "\n\n".join(tables)


@dataclass(frozen=True)
class PartSummary:
    """Summaries of the methods on one transformer, and the number of steps of the last run."""

    methods: Mapping[str, Any]
    """Summary of each method that is on, by name."""
    steps: int
    """Number of steps of the run that call this transformer."""
    layers: tuple[str, ...]
    """Names of the self-attention layers; empty if they are not known."""


def summarise(target: Any) -> dict[str, PartSummary]:
    """Return what the methods did in the last run, for each transformer of a target by the names of `parts_of`."""
    parts, on = parts_of(target), installations_of(target)
    runs = {name: x.run for name, x in on.items()}
    timesteps = getattr(scheduler_of(target), "timesteps", None)
    if timesteps is not None and any(_is_over(x, timesteps) for x in runs.values()):
        # A transformer that the last run did not call still has the run before.
        runs = {name: x if _is_over(x, timesteps) else Run() for name, x in runs.items()}
    found = {}
    for name, part in parts.items():
        methods: dict[str, Any] = {}
        layers: tuple[str, ...] = ()
        if name in on:
            host = on[name].host(transformer_of(part, any_model=True))
            methods = {x.name: x.rows(host, runs[name]) for x in on[name].methods.values()}
            layers = tuple(host.layers)
        elif on and is_supported(transformer := transformer_of(part, any_model=True)):
            layers = tuple(family_of(transformer).self_attention(transformer))
        found[name] = PartSummary(methods, _steps_of(name, runs), layers)
    return found


def _is_over(run: Run | None, timesteps: Tensor) -> bool:
    return run is not None and run.timesteps is timesteps


def _steps_of(name: str, runs: Mapping[str, Run | None]) -> int:
    """Return the number of steps that called a transformer, from its run or from the run of the other transformer."""
    if name in runs:
        run = runs[name]
        return 0 if run is None else run.step + 1
    other = next(iter(runs.values()), None)
    if other is None or other.end is None or other.timesteps is None:
        return 0
    if name == TRANSFORMERS[0]:
        return other.begin
    return len(other.timesteps) - other.end if other.is_last_step else 0


def joined_config(configs: Mapping[str, dict], names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of two transformers: one dict if they are equal, else a dict by transformer (None: off)."""
    chosen = {name: configs.get(name) for name in names}
    first = next(iter(configs.values()))
    return first if all(x == first for x in chosen.values()) else chosen


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add several counts by reason."""
    sums: dict[str, int] = {}
    for count in counts:
        for reason, n in count.items():
            sums[reason] = sums.get(reason, 0) + n
    return sums


def reasons(counts: Mapping[str, int]) -> str:
    """Return counts by reason as one line."""
    return ", ".join(f"{n} x {reason}" for reason, n in counts.items())


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as aligned columns. The last column and rows of a single cell are not padded."""
    columns = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == columns) for i in range(columns - 1)]
    lines = []
    for row in rows:
        padded = [cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*padded, row[-1]]).rstrip())
    return "\n".join(lines)
