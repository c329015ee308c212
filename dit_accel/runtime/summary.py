"""`Summary`: what each method did in the last run, and the tables that summaries print."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_accel.runtime.install import find, parts_of


@dataclass(frozen=True)
class Summary:
    """Summaries of the methods on a transformer for the last run; prints as tables."""

    methods: Mapping[str, Any] = field(default_factory=dict)
    """The summary of each method that is on, by its name. Those of a second transformer have its name too."""

    @property
    def enabled(self) -> bool:
        """True if any method is on."""
        return bool(self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: x.to_dict() for name, x in self.methods.items()}

    def __str__(self) -> str:
        if not self.enabled:
            return "acceleration is off"
        return "\n\n".join(str(x) for x in self.methods.values())


def summarise(target: Any) -> Summary:
    """Return the summaries of the methods on a transformer, or on those of a pipeline, for the last run."""
    rows = {}
    for part, module in parts_of(target).items():
        found = find(module)
        if found is None:
            continue
        transformer, installation = found
        host = installation.host(transformer)
        more = "" if part == "transformer" else f" of {part}"
        for name, method in installation.methods.items():
            rows[name + more] = method.rows(host, installation.run)
    return Summary(rows)


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several counts by reason."""
    sums: dict[str, int] = {}
    for count in counts:
        for reason, n in count.items():
            sums[reason] = sums.get(reason, 0) + n
    return sums


def reasons(counts: Mapping[str, int]) -> str:
    """Counts by reason, as one line."""
    return ", ".join(f"{n} x {reason}" for reason, n in counts.items())


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; the last column, and rows of a single cell, are not padded."""
    columns = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == columns) for i in range(columns - 1)]
    lines = []
    for row in rows:
        padded = [cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*padded, row[-1]]).rstrip())
    return "\n".join(lines)
