"""`RunState`: what region-adaptive sampling keeps for one run, and its summary."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from dit_accel.config import RASConfig
from dit_accel.ras.plan import RunPlan
from dit_accel.ras.summary import RASSummary, StepSummary
from dit_accel.runtime.method import Host


@dataclass
class StepRecord:
    """Record of one step of a run."""

    active: int
    """Image tokens that ran, the least over its calls."""
    tokens: int
    prompt: int
    """Text tokens of a call, with padding."""
    text: int
    """Those that the layers see."""
    token_flops: float
    """`Call.token_flops` of its calls."""
    tiles: Tensor | None
    """Active tiles `[S, count]`; None on a dense step, none on a forecast step."""
    oldest: Tensor
    """Largest age after the step, in steps."""
    calls: int = 0
    fresh: int = 0
    """Calls that computed what is kept for their context."""
    forecasts: int = 0
    """Calls that were left out."""
    dense_calls: Counter[str] = field(default_factory=Counter)
    """Dense calls, by reason."""


@dataclass
class RunState:
    """State that is kept for one run."""

    steps: dict[int, StepRecord] = field(default_factory=dict)
    plan: RunPlan | None = None
    """None before the first call, and outside of sampling loops."""
    kv_bytes: int = 0
    """Most that cached keys and values have taken, all contexts together."""


def summarise(state: RunState, config: RASConfig, host: Host) -> RASSummary:
    """Return what a run did."""
    steps = []
    for step, record in sorted(state.steps.items()):
        ran = record.calls - record.forecasts
        dense = ran > 0 and record.active == record.tokens
        steps.append(
            StepSummary(
                step=step,
                mode="dense" if dense else "partial" if ran else "forecast",
                active=record.active if ran else 0,
                tokens=record.tokens,
                dense_calls=dict(record.dense_calls),
                oldest=0 if dense else int(record.oldest),
                cost=_cost(host, record),
            )
        )
    return RASSummary(
        config=config.to_dict(),
        steps=steps,
        kv_predictor="linear" if state.plan is not None and state.plan.linear_kv else "hold",
        kv_bytes=state.kv_bytes,
    )


def _cost(host: Host, record: StepRecord) -> float:
    family, transformer = host.family, host.transformer

    def flops(active: int) -> float:
        flops = family.flops(transformer, active, record.tokens, record.text)
        return flops + active * record.token_flops

    text = family.text_flops(transformer, record.prompt)
    dense_calls = record.dense_calls.total()
    partial = record.calls - dense_calls - record.forecasts
    run = dense_calls * flops(record.tokens) + partial * flops(record.active)
    return (run + record.fresh * text) / (record.calls * (flops(record.tokens) + text))
