"""`enable`, `disable`, `summary`: acceleration of a pipeline, put on and taken off again."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_accel.config import RASConfig, SLAConfig
from dit_accel.models import FAMILIES, Family, family_of
from dit_accel.models.clock import Clock
from dit_accel.ras import RegionAdaptiveSampling
from dit_accel.sla import SparseAttention


class Session:
    """One transformer's acceleration: the processors put in, the hooks, and what they share."""

    def __init__(
        self, pipe: Any, family: Family, *, ras: RASConfig | None, sla: SLAConfig | None
    ) -> None:
        transformer = pipe.transformer
        self.family = family
        self.layers = family.self_attention(transformer)
        self.cross = family.cross_attention(transformer) if ras is not None else {}
        self._check(transformer, ras)
        self.clock = Clock(pipe)
        self.sla = None if sla is None else SparseAttention(sla, len(self.layers))
        self.ras = None if ras is None else RegionAdaptiveSampling(ras, self.layers)
        for i, (name, layer) in enumerate(self.layers.items()):
            processor = family.processor(layer.module.processor)
            if self.sla is not None:
                processor.attend = partial(self.sla, i)
            if self.ras is not None:
                processor.kv_store = self.ras.stores[name]
            layer.module.set_processor(processor)
        for module in self.cross.values():
            module.set_processor(family.cross_processor(module.processor))
        self._installed = {name: module.processor for name, module in self._modules()}
        self._hooks = [
            transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            transformer.register_forward_hook(self.after_forward, always_call=True),
        ]
        if self.ras is not None:
            self._hooks += family.hooks(transformer, self.ras)

    @property
    def ras_config(self) -> RASConfig | None:
        return None if self.ras is None else self.ras.config

    @property
    def sla_config(self) -> SLAConfig | None:
        return None if self.sla is None else self.sla.config

    def _modules(self) -> list[tuple[str, Any]]:
        return [(name, x.module) for name, x in self.layers.items()] + list(self.cross.items())

    def _check(self, transformer: Any, ras: RASConfig | None) -> None:
        for name, module in self._modules():
            kind = type(module.processor).__name__
            if kind not in self.family.stock_processors:
                raise ValueError(
                    f"pipe.transformer.{name}: processor {kind}; accepted: {', '.join(self.family.stock_processors)} "
                    "(restore it before enable)"
                )
            if getattr(module.processor, "_parallel_config", None) is not None:
                raise ValueError(
                    "pipe.transformer: context parallelism is on; accepted: a single device"
                )
        if ras is not None and getattr(transformer, "is_cache_enabled", False):
            raise ValueError(
                "ras: a step cache of diffusers is on, and both decide what a step computes; "
                "call pipe.transformer.disable_cache() first"
            )

    @torch.compiler.disable
    def before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the transformer."""
        call = self.family.call(self.clock.pipe, transformer, args, kwargs)
        if self.clock.tick(transformer, call.context, call.variant):
            self._begin_run(transformer)
        grid = self.family.token_grid(transformer, call.hidden_states)
        if self.sla is not None:
            self.sla.begin_step(self.clock.step, self.clock.num_steps, grid)
        if self.ras is not None:
            guidance = bool(getattr(self.clock.pipe, "do_classifier_free_guidance", False))
            self.ras.begin_call(self.clock, call, grid, halves=2 if guidance else 1)
            kwargs = self.family.focus_inputs(self.ras, kwargs)
        return args, kwargs

    def _begin_run(self, transformer: Any) -> None:
        for name, module in self._modules():
            if module.processor is not self._installed[name]:
                raise RuntimeError(
                    f"the processor of {name} was changed after enable: call disable() first"
                )
        if self.sla is not None:
            self.sla.reset()
        if self.ras is not None:
            if getattr(transformer, "is_cache_enabled", False):
                raise RuntimeError(
                    "a step cache of diffusers was switched on after enable(ras=...), and both decide what a "
                    "step computes: call pipe.transformer.disable_cache() or disable() first"
                )
            self.ras.reset()

    @torch.compiler.disable
    def after_forward(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the transformer, called after a failure too."""
        if self.ras is None:
            return
        for module in self.cross.values():
            if hasattr(module.processor, "text"):
                module.processor.text = None
        self.ras.end_call(self.clock, failed=output is None)

    def remove(self, transformer: nn.Module) -> None:
        """Put back what was there; processors that somebody else set stay."""
        for hook in self._hooks:
            hook.remove()
        for name, module in self._modules():
            ours = self._installed[name]
            if module.processor is ours:
                if hasattr(ours, "_attention_backend"):
                    ours.stock._attention_backend = ours._attention_backend
                module.set_processor(ours.stock)


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
    pipe: Any,
    *,
    ras: RASConfig | dict | str | os.PathLike | None = None,
    sla: SLAConfig | dict | str | os.PathLike | None = None,
) -> None:
    """Accelerate a diffusers pipeline in place.

    Args:
        pipe: a pipeline with a supported transformer: Wan2.1, Stable Diffusion 3 and 3.5,
            Lumina-Next, Lumina-Image 2.0.
        ras: region-adaptive sampling: an `RASConfig`, a preset ("quality", "balanced", "fast",
            "paper"), a YAML file, or a dict of `RASConfig` fields.
        sla: sparse attention (Wan2.1): an `SLAConfig`, a preset ("quality", "balanced", "fast"),
            a YAML file, or a dict of `SLAConfig` fields.

    Raises:
        ValueError: a bad argument, a pipeline that is not supported, or one that is already on.
    """
    if ras is None and sla is None:
        raise ValueError(
            "ras=None, sla=None: nothing to enable; accepted are a preset name, a config, a YAML file, a dict"
        )
    ras_config = None if ras is None else RASConfig.load(ras)
    sla_config = None if sla is None else SLAConfig.load(sla)
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "pipe.transformer_2: two-transformer pipelines (Wan2.2) are not supported; accepted: None"
        )
    if not isinstance(getattr(pipe, "transformer", None), nn.Module):
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no transformer; accepted are pipelines of {', '.join(FAMILIES)}"
        )
    family = family_of(pipe.transformer)
    if sla_config is not None and not family.sparse_attention:
        raise ValueError(
            f"sla: sparse attention does not support {family.name} yet; accepted: None"
        )
    before = session_of(pipe)
    if before is not None:
        for name, new, old in (("ras", ras_config, before.ras), ("sla", sla_config, before.sla)):
            if new is not None and old is not None:
                raise ValueError(
                    f"{name}: already enabled on this transformer; call disable() first"
                )
        ras_config = ras_config or before.ras_config
        sla_config = sla_config or before.sla_config
        before.remove(pipe.transformer)
    Session(pipe, family, ras=ras_config, sla=sla_config)


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
    layers = (
        []
        if sla is None
        else [
            LayerSummary(
                name=name,
                scheduled=sla.is_scheduled(i),
                sparse_calls=stats.sparse_calls,
                dense_calls=dict(stats.dense_calls),
                density=stats.density,
            )
            for i, (name, stats) in enumerate(zip(session.layers, sla.layers, strict=True))
        ]
    )
    if strict and (never := [x for x in layers if x.scheduled and not x.sparse_calls]):
        raise RuntimeError(
            "never sparse although scheduled: "
            + "; ".join(f"{x.name} ({', '.join(x.dense_calls) or 'not called'})" for x in never)
        )
    return Summary(enabled=True, config={} if sla is None else sla.config.to_dict(), layers=layers)
