"""`enable`, `disable`, `summary`: acceleration of a pipeline, put on and taken off again."""

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from dit_accel.config import SLAConfig
from dit_accel.models import family_of
from dit_accel.models.clock import Clock
from dit_accel.sla import SparseAttention


class Session:
    """One transformer's acceleration: the processors put in, the hook, and what they share."""

    def __init__(self, pipe: Any, family: ModuleType, sla: SLAConfig) -> None:
        transformer = pipe.transformer
        modules = family.self_attention(transformer)
        for name, module in modules.items():
            kind = type(module.processor).__name__
            if kind not in family.STOCK_PROCESSORS:
                raise ValueError(
                    f"pipe.transformer.{name}: processor {kind}; accepted: {', '.join(family.STOCK_PROCESSORS)} "
                    "(restore it before enable)"
                )
            if module.processor._parallel_config is not None:
                raise ValueError(
                    "pipe.transformer: context parallelism is on; accepted: a single device"
                )
        self.family = family
        self.names = list(modules)
        self.sla = SparseAttention(sla, len(modules))
        self.clock = Clock(pipe)
        for layer, module in enumerate(modules.values()):
            module.set_processor(family.WanSparseAttnProcessor(self, layer, module.processor))
        self._hook = transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def __call__(self, layer: int, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        return self.sla(layer, q, k, v, **kwargs)

    def before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformer."""
        hidden_states, context = self.family.call_inputs(args, kwargs)
        if self.clock.tick(transformer, context):
            for name, module in self.family.self_attention(transformer).items():
                if getattr(module.processor, "attend", None) is not self:
                    raise RuntimeError(
                        f"the processor of {name} was changed after enable: call disable() first"
                    )
            self.sla.reset()
        grid = self.family.token_grid(transformer, hidden_states)
        self.sla.begin_step(self.clock.step, self.clock.num_steps, grid)

    def remove(self, transformer: nn.Module) -> None:
        """Put back what was there; processors that somebody else set stay."""
        self._hook.remove()
        for module in self.family.self_attention(transformer).values():
            if getattr(module.processor, "attend", None) is self:
                stock = module.processor.stock
                stock._attention_backend = module.processor._attention_backend
                module.set_processor(stock)


def session_of(pipe: Any) -> Session | None:
    """The acceleration on this pipeline's transformer, if any (shared components share it)."""
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        return None
    for hook in transformer._forward_pre_hooks.values():
        if isinstance(owner := getattr(hook, "__self__", None), Session):
            return owner
    return None


def enable(
    pipe: Any, *, ras: object = None, sla: SLAConfig | dict | str | os.PathLike | None = None
) -> None:
    """Accelerate a diffusers pipeline in place.

    Args:
        pipe: a pipeline with a supported transformer (Wan2.1).
        ras: region-adaptive sampling; only None in this version.
        sla: sparse attention: an `SLAConfig`, a preset ("quality", "balanced", "fast"), a YAML
            file, or a dict of `SLAConfig` fields.

    Raises:
        ValueError: a bad argument, a pipeline that is not supported, or one that is already on.
    """
    if ras is not None:
        raise ValueError(
            f"ras={ras!r}: accepted is None; this version has no region-adaptive sampling"
        )
    if sla is None:
        raise ValueError(
            "sla=None: nothing to enable; accepted are a preset name, an SLAConfig, a YAML file, a dict"
        )
    config = SLAConfig.load(sla)
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "pipe.transformer_2: two-transformer pipelines (Wan2.2) are not supported; accepted: None"
        )
    if not isinstance(getattr(pipe, "transformer", None), nn.Module):
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no transformer; accepted are Wan2.1 pipelines"
        )
    if session_of(pipe) is not None:
        raise ValueError("sla: already enabled on this transformer; call disable() first")
    Session(pipe, family_of(pipe.transformer), config)


def disable(pipe: Any) -> None:
    """Take the acceleration off; the transformer is then exactly what it was. No-op if it is off."""
    session = session_of(pipe)
    if session is not None:
        session.remove(pipe.transformer)


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer in the last run."""

    name: str
    scheduled: bool
    """Whether the schedule lets this layer run sparse at all."""
    sparse_calls: int
    dense_calls: dict[str, int]
    """By reason."""
    density: float | None
    """Mean over the sparse calls."""


@dataclass(frozen=True)
class Summary:
    """What acceleration did in the last run; prints as a table."""

    enabled: bool
    config: dict[str, Any]
    layers: list[LayerSummary]

    @property
    def sparse_calls(self) -> int:
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Self-attention calls that ran dense, by reason."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for reason, n in layer.dense_calls.items():
                total[reason] = total.get(reason, 0) + n
        return total

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
            # One cross-attention follows every self-attention; it is never replaced.
            "cross_attention_dense_calls": self.sparse_calls + sum(self.dense_calls.values()),
            "layers": [vars(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        if not self.enabled:
            return "acceleration is off"
        rows = [("layer", "sparse", "dense", "density", "why dense")]
        for x in self.layers:
            why = ", ".join(f"{n} x {reason}" for reason, n in x.dense_calls.items())
            density = "-" if x.density is None else f"{x.density:.3f}"
            rows.append(
                (x.name, str(x.sparse_calls), str(sum(x.dense_calls.values())), density, why)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]
            ).rstrip()
            for row in rows
        ]
        if self.density is not None:
            lines.append(
                f"density {self.density:.3f} in sparse calls, {self.overall_density:.3f} over all self-attention"
            )
        elif self.layers and sum(self.dense_calls.values()):
            lines.append("no self-attention call ran sparse")
        lines.append("cross-attention is always dense")
        return "\n".join(lines)


def summary(pipe: Any, *, strict: bool = False) -> Summary:
    """What ran sparse and what ran dense, and why, in the last run of this pipeline.

    Args:
        pipe: a pipeline, enabled or not.
        strict: raise RuntimeError if a layer that the schedule lets run sparse never did.
    """
    session = session_of(pipe)
    if session is None:
        if strict:
            raise RuntimeError("acceleration is off: call enable() first")
        return Summary(enabled=False, config={}, layers=[])
    sla = session.sla
    layers = [
        LayerSummary(
            name=name,
            scheduled=sla.is_scheduled(i),
            sparse_calls=stats.sparse_calls,
            dense_calls=dict(stats.dense_calls),
            density=stats.density,
        )
        for i, (name, stats) in enumerate(zip(session.names, sla.layers, strict=True))
    ]
    if strict and (never := [x for x in layers if x.scheduled and not x.sparse_calls]):
        raise RuntimeError(
            "never sparse although scheduled: "
            + "; ".join(f"{x.name} ({', '.join(x.dense_calls) or 'not called'})" for x in never)
        )
    return Summary(enabled=True, config=sla.config.to_dict(), layers=layers)
