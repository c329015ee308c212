"""What acceleration did in a run: counts, densities, costs; prints as tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dit_accel.ras import StepRecord
from dit_accel.runtime.install import Session


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer under sparse attention."""

    name: str
    scheduled: bool
    """Whether the schedule lets this layer run sparse at all."""
    sparse_calls: int
    dense_calls: dict[str, int]
    """By reason."""
    density: float | None
    """Mean over the sparse calls."""


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
        return sum(step.mode == "ras" for step in self.steps)

    @property
    def cost(self) -> float:
        """Steps of a dense run that would cost as much, by counted FLOPs."""
        return sum(step.cost for step in self.steps)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Calls on all tokens, by reason."""
        return _total(step.dense_calls for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "ras_steps": self.ras_steps,
            "cost": self.cost,
            "dense_calls": self.dense_calls,
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("step", "mode", "active", "oldest", "cost", "why dense")]
        for x in self.steps:
            active = f"{x.active} of {x.tokens}"
            rows.append(
                (
                    str(x.step),
                    x.mode,
                    active,
                    str(x.oldest),
                    f"{x.cost:.3f}",
                    _reasons(x.dense_calls),
                )
            )
        if not self.steps:
            return "region-adaptive sampling: no run yet"
        kept = "none"
        if self.kv_bytes:
            kept = f"{self.kv_predictor}, {self.kv_bytes / 2**20:.1f} MiB"
        rows.append(
            (
                f"{self.ras_steps} of {len(self.steps)} steps region-adaptive, cost of {self.cost:.2f} dense steps, "
                f"cached keys and values: {kept}",
            )
        )
        return _table(rows)


@dataclass(frozen=True)
class Summary:
    """What acceleration did in the last run; prints as tables."""

    enabled: bool
    config: dict[str, Any]
    """Of sparse attention; empty if it is off."""
    layers: list[LayerSummary]
    ras: RASSummary | None = None
    cross_attention_layers: int = 0
    """Attention modules from image to text, apart from those in `layers`; always dense."""

    @property
    def cross_attention_dense_calls(self) -> int:
        """Each of them runs once in every call of the transformer."""
        calls = (x.sparse_calls + sum(x.dense_calls.values()) for x in self.layers)
        return self.cross_attention_layers * max(calls, default=0)

    @property
    def sparse_calls(self) -> int:
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Self-attention calls that ran dense, by reason."""
        return _total(layer.dense_calls for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Attended share of all (query, key) pairs, averaged over the sparse calls."""
        kept = sum(
            layer.density * layer.sparse_calls for layer in self.layers if layer.density is not None
        )
        return kept / self.sparse_calls if self.sparse_calls else None

    @property
    def overall_density(self) -> float | None:
        """The same over every self-attention call: dense steps and layers count as 1."""
        dense = sum(self.dense_calls.values())
        calls = self.sparse_calls + dense
        return ((self.density or 0.0) * self.sparse_calls + dense) / calls if calls else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "enabled": self.enabled,
            "config": self.config,
            "density": self.density,
            "overall_density": self.overall_density,
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "cross_attention_dense_calls": self.cross_attention_dense_calls,
            "layers": [asdict(layer) for layer in self.layers],
            "ras": None if self.ras is None else self.ras.to_dict(),
        }

    def __str__(self) -> str:
        if not self.enabled:
            return "acceleration is off"
        parts = []
        if self.layers:
            parts.append(self._attention_table())
        if self.ras is not None:
            parts.append(str(self.ras))
        return "\n\n".join(parts)

    def _attention_table(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "sparse", "dense", "density", "why dense")]
        for x in self.layers:
            density = "-" if x.density is None else f"{x.density:.3f}"
            dense = str(sum(x.dense_calls.values()))
            rows.append((x.name, str(x.sparse_calls), dense, density, _reasons(x.dense_calls)))
        if self.density is not None:
            rows.append(
                (
                    f"density {self.density:.3f} in sparse calls, {self.overall_density:.3f} over all self-attention",
                )
            )
        elif sum(self.dense_calls.values()):
            rows.append(("no self-attention call ran sparse",))
        if self.cross_attention_layers:
            rows.append(("cross-attention reads all of its keys",))
        return _table(rows)


def summarise(session: Session) -> Summary:
    """The counts of the last run."""
    sla = session.sla
    layers = (
        []
        if sla is None
        else [
            LayerSummary(
                name=name,
                scheduled=sla.layers[name].scheduled,
                sparse_calls=stats.sparse_calls,
                dense_calls=stats.dense_calls,
                density=stats.density,
            )
            for name, stats in sla.stats().items()
        ]
    )
    return Summary(
        enabled=True,
        config={} if sla is None else sla.config.to_dict(),
        layers=layers,
        ras=None if session.ras is None else _summarise_ras(session),
        cross_attention_layers=len(session.family.cross_attention(session.transformer)),
    )


def _summarise_ras(session: Session) -> RASSummary:
    ras = session.ras
    assert ras is not None
    steps = []
    for step, record in sorted(ras.steps.items()):
        dense = record.active == record.tokens
        steps.append(
            StepSummary(
                step=step,
                mode="dense" if dense else "ras",
                active=record.active,
                tokens=record.tokens,
                dense_calls=dict(record.dense_calls),
                oldest=0 if dense else int(record.oldest),
                cost=_cost(session, record),
            )
        )
    return RASSummary(
        config=ras.config.to_dict(),
        steps=steps,
        kv_predictor="linear" if ras.run is not None and ras.run.linear_kv else "hold",
        kv_bytes=ras.kv_bytes,
    )


def _cost(session: Session, record: StepRecord) -> float:
    family, transformer = session.family, session.transformer

    def flops(active: int) -> float:
        return family.flops(transformer, active, record.tokens, record.text)

    text = family.text_flops(transformer, record.prompt)
    dense_calls = record.dense_calls.total()
    run = dense_calls * flops(record.tokens) + (record.calls - dense_calls) * flops(record.active)
    return (run + record.fresh * text) / (record.calls * (flops(record.tokens) + text))


def _total(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for reason, n in count.items():
            total[reason] = total.get(reason, 0) + n
    return total


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in counts.items())


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns aligned; the last one, and rows of one cell, run free."""
    columns = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == columns) for i in range(columns - 1)]
    lines = []
    for row in rows:
        padded = [cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*padded, row[-1]]).rstrip())
    return "\n".join(lines)
