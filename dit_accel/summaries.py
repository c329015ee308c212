"""`Summary`: the return type of `dit_accel.summary`."""

from collections.abc import Mapping
from typing import Any

from dit_accel.ras.summary import RASSummary
from dit_accel.runtime import summary
from dit_accel.sla.summary import AttentionSummary, LayerSummary


class Summary(summary.Summary):
    """Summary of acceleration in the last run. It prints as tables.

    Attributes:
        methods: summary of each method that is on, by name. For two transformers: summaries of both together.
        parts: summary of each transformer, by name, for a pipeline with two; else empty.
    """

    parts: Mapping[str, "Summary"]

    @property
    def sla(self) -> AttentionSummary | None:
        """Summary of sparse attention; None if it is off."""
        return self.methods.get("sla")

    @property
    def ras(self) -> RASSummary | None:
        """Summary of region-adaptive sampling; None if it is off."""
        return self.methods.get("ras")

    @property
    def config(self) -> dict[str, Any]:
        """Settings of sparse attention; empty if it is off."""
        return self._attention.config

    @property
    def layers(self) -> list[LayerSummary]:
        """Summaries of the self-attention layers; empty if sparse attention is off."""
        return self._attention.layers

    @property
    def sparse_calls(self) -> int:
        """Number of self-attention calls that ran sparse."""
        return self._attention.sparse_calls

    @property
    def dense_calls(self) -> dict[str, int]:
        """Number of self-attention calls that ran dense, by reason."""
        return self._attention.dense_calls

    @property
    def density(self) -> float | None:
        """Attended share of the (query, key) pairs, averaged over the sparse calls; None without one."""
        return self._attention.density

    @property
    def overall_density(self) -> float | None:
        """Attended share averaged over all self-attention calls, with 1 for dense calls; None before a run."""
        return self._attention.overall_density

    @property
    def cross_attention_dense_calls(self) -> int:
        """Number of cross-attention calls, which always run dense."""
        return self._attention.cross_attention_dense_calls

    @property
    def _attention(self) -> AttentionSummary:
        return self.sla or AttentionSummary({}, [])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the fields of sparse attention, and one entry for each other method."""
        further = {name: x.to_dict() for name, x in self.methods.items() if name != "sla"}
        values = {"enabled": self.enabled, **self._attention.to_dict(), "ras": None, **further}
        if self.parts:
            values["transformers"] = {name: x.to_dict() for name, x in self.parts.items()}
        return values


def summary_of(target: Any) -> Summary:
    """Return the summary of the last run; `target` as in `dit_accel.enable`."""
    parts = summary.summarise(target)
    names = dict.fromkeys(name for part in parts.values() for name in part.methods)
    if len(parts) == 1 or not names:
        return Summary(next(iter(parts.values())).methods)
    methods: dict[str, Any] = {}
    for name in names:
        rows = {key: part.methods[name] for key, part in parts.items() if name in part.methods}
        join = getattr(next(iter(rows.values())), "joined", None)
        if join is None:
            methods |= {f"{name} of {key}": row for key, row in rows.items()}
        else:
            methods[name] = join(parts)
    return Summary(methods, {name: Summary(part.methods) for name, part in parts.items()})
