"""`AttentionSummary`: summary of sparse attention in one run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dit_accel.runtime.summary import PartSummary, joined_config, reasons, table, total


@dataclass(frozen=True)
class LayerSummary:
    """Summary of one self-attention layer."""

    name: str
    """Name of the attention module."""
    scheduled: bool
    """True if the schedule lets this layer run sparse in some step."""
    sparse_calls: int
    """Number of sparse calls."""
    dense_calls: dict[str, int]
    """Number of dense calls by reason."""
    density: float | None
    """Share of (query, key) pairs that sparse calls attended to; None without a sparse call."""

    @property
    def calls(self) -> int:
        """Number of calls, sparse and dense."""
        return self.sparse_calls + sum(self.dense_calls.values())


@dataclass(frozen=True)
class AttentionSummary:
    """Summary of sparse attention in the last run."""

    config: dict[str, Any]
    """Settings."""
    layers: list[LayerSummary]
    """Self-attention layers."""
    cross_attention_layers: int = 0
    """Number of cross-attention modules, which always run dense."""
    cross_attention_dense_calls: int = 0
    """Number of calls of the cross-attention modules."""

    @classmethod
    def joined(cls, parts: Mapping[str, PartSummary]) -> "AttentionSummary":
        """Return the summary of two transformers together. Calls of a transformer without sparse attention are dense."""
        on = {name: x.methods["sla"] for name, x in parts.items() if "sla" in x.methods}
        steps = sum(parts[name].steps for name in on)
        calls = sum(max((x.calls for x in one.layers), default=0) for one in on.values())
        layers: list[LayerSummary] = []
        for name, part in parts.items():
            if name in on:
                layers += [replace(x, name=f"{name}.{x.name}") for x in on[name].layers]
                continue
            count = round(part.steps * calls / steps) if steps else 0
            off = {"off": count} if count else {}
            layers += [LayerSummary(f"{name}.{x}", False, 0, off, None) for x in part.layers]
        return cls(
            joined_config({name: one.config for name, one in on.items()}, parts),
            layers,
            sum(x.cross_attention_layers for x in on.values()),
            sum(x.cross_attention_dense_calls for x in on.values()),
        )

    @property
    def sparse_calls(self) -> int:
        """Number of self-attention calls that ran sparse."""
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Number of self-attention calls that ran dense, by reason."""
        return total(layer.dense_calls for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Attended share of the (query, key) pairs, averaged over the sparse calls; None without one."""
        kept = sum(
            layer.density * layer.sparse_calls for layer in self.layers if layer.density is not None
        )
        return kept / self.sparse_calls if self.sparse_calls else None

    @property
    def overall_density(self) -> float | None:
        """Attended share averaged over all self-attention calls, with 1 for dense calls; None before a run."""
        dense = sum(self.dense_calls.values())
        calls = self.sparse_calls + dense
        return ((self.density or 0.0) * self.sparse_calls + dense) / calls if calls else None

    @property
    def totals(self) -> str:
        """Density of all layers as one line; empty before a run."""
        if self.density is not None:
            return f"density {self.density:.3f} in sparse calls, {self.overall_density:.3f} over all self-attention"
        return "no self-attention call ran sparse" if sum(self.dense_calls.values()) else ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "config": self.config,
            "density": self.density,
            "overall_density": self.overall_density,
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "cross_attention_dense_calls": self.cross_attention_dense_calls,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "sparse", "dense", "density", "why dense")]
        for x in self.layers:
            density = "-" if x.density is None else f"{x.density:.3f}"
            dense = str(sum(x.dense_calls.values()))
            rows.append((x.name, str(x.sparse_calls), dense, density, reasons(x.dense_calls)))
        if self.totals:
            rows.append((self.totals,))
        if self.cross_attention_layers:
            rows.append(("cross-attention reads all of its keys",))
        return table(rows)
