"""`RunState`: state of region-adaptive sampling for one run; `summarise`: the summary of it."""

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
    """Number of image tokens that ran; the minimum over the calls of the step."""
    tokens: int
    """Number of image tokens in all."""
    prompt: int
    """Number of text tokens of a call, with padding."""
    text: int
    """Number of text tokens in the sequences of the layers."""
    token_flops: float
    """`Call.token_flops` of the calls."""
    tiles: Tensor | None
    """Active tiles `[S, count]`; None in a dense step, count 0 in a forecast step."""
    oldest: Tensor
    """Largest age after the step, in steps."""
    calls: int = 0
    """Number of calls."""
    fresh: int = 0
    """Number of calls that were the first of their context."""
    forecasts: int = 0
    """Number of calls in which the transformer did not run."""
    dense_calls: Counter[str] = field(default_factory=Counter)
    """Number of dense calls by reason."""


@dataclass
class RunState:
    """State of one run."""

    steps: dict[int, StepRecord] = field(default_factory=dict)
    """Record of each step by its index."""
    plan: RunPlan | None = None
    """Plan of the run; None before the first call and outside of sampling loops."""
    kv_bytes: int = 0
    """Largest number of bytes of cached keys and values, all contexts together."""


def summarise(state: RunState, config: RASConfig, host: Host) -> RASSummary:
    """Return the summary of a run."""
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
