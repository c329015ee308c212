"""`counted_cost`: FLOPs of a run. `match_cost`: the setting of a step cache with which it costs as much as a target."""

import ast
import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dit_accel.eval.runs.caches import StepCache
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.step_caches import step_cache

SLACK = 0.02
"""Share of the target by which a cost may exceed it, and within which the search ends."""
PROBES = 8
"""Most values that are tried in a stage."""
_ATTENTION = ("flash_attention_for_cpu", "fused_attention_overrideable")
"""Operators of `scaled_dot_product_attention` that torch's counter does not list."""


def counted_cost(pipe: Any, call: Callable[[], Any]) -> int:
    """Return the FLOPs of matrix products, convolutions and attention in the transformers of `pipe` while `call` runs.

    Operators that torch does not know, such as ours, count nothing. A compiled transformer runs eagerly meanwhile.
    """

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)  # from the shapes

    operators = [getattr(torch.ops.aten, f"_scaled_dot_product_{x}") for x in _ATTENTION]
    mapping: dict[Any, Any] = dict.fromkeys(operators, attention)
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings(), counter:
        warnings.filterwarnings("ignore", "Using `torch.compile")  # the counter's hooks run twice
        call()
    counts = counter.get_flop_counts()  # by module
    names = {type(x).__name__ for x in transformers_of(pipe)}
    return sum(sum(counts.get(name, {}).values()) for name in names)


@dataclass(frozen=True)
class Match:
    """Setting of a step cache, and its cost."""

    config: Any  # a cache config of diffusers
    value: float  # value of the setting
    cost: float  # counted FLOPs of the transformer calls over those of dense sampling, mean over the samples
    stage: int = 0  # index of the stage, see `StepCache.stages`
    ratios: list[float] | None = None  # result of the calibration, if the cache needs one
    note: str | None = None  # message if the target is not reached


@dataclass
class Probes:
    """Samples on which costs are counted. They must not be those that are compared afterwards."""

    pipe: Any
    """A loaded pipeline without acceleration."""
    sample: Callable[[range], Any]
    """Function that makes the samples of these numbers with the pipeline."""
    rows: range = range(2)
    """Numbers of the samples. Each is made alone, because a step cache decides for all samples of a call at once."""

    def cost(self, on: Callable[[], Any] = contextlib.nullcontext) -> float:
        """Return the cost of sampling inside the context manager that `on` makes, as a share of dense sampling.

        Raises:
            RuntimeError: no FLOPs are counted.
        """
        from diffusers.utils import logging

        dense, _ = self._dense
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # FasterCache warns each time that it is enabled
        try:
            with on():
                counts = self._count()
        finally:
            logging.set_verbosity(before)
        return float(np.mean([x / y for x, y in zip(counts, dense, strict=True)]))

    @cached_property
    def _dense(self) -> tuple[list[int], int]:
        """FLOPs of each dense sample, and number of calls that the solver makes in a run."""
        counts = self._count()
        if not all(counts):
            raise RuntimeError("pipe: torch counts no FLOPs of its transformer")
        # A solver of second order makes more calls than it has steps.
        return counts, len(self.pipe.scheduler.timesteps)

    def _count(self) -> list[int]:
        return [
            counted_cost(self.pipe, lambda i=i: self.sample(range(i, i + 1)))  # type: ignore[misc]
            for i in self.rows
        ]

    @property
    def steps(self) -> int:
        """Number of calls that the solver makes in a run."""
        return self._dense[1]

    def calibrate(self) -> list[float]:
        """Return the ratios that MagCache needs: means over the samples and over both calls of guidance."""
        import diffusers

        config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=self.steps)
        printed = io.StringIO()  # diffusers only prints them
        with step_cache(self.pipe, config), contextlib.redirect_stdout(printed):
            for i in self.rows:
                self.sample(range(i, i + 1))
        lines = [x for x in printed.getvalue().splitlines() if x.startswith("[1")]
        return np.mean([ast.literal_eval(x) for x in lines], axis=0).round(5).tolist()


def match_cost(
    probes: Probes, cache: StepCache, target: float, *, value: float | None = None
) -> Match:
    """Return the setting of a step cache whose cost is nearest to `target` and exceeds it by at most `SLACK`.

    Costs are step functions of the setting: a step runs or it does not.

    Args:
        probes: samples on which costs are counted.
        cache: one of `caches.CACHES`.
        target: cost as a share of dense sampling, in (0, 1].
        value: keep this value of the setting, and only count its cost. Default: search.

    Raises:
        ValueError: a target out of range, or a cache that cannot run on the model.
    """
    from scipy.optimize import bisect

    if not 0 < target <= 1:
        raise ValueError(f"target={target}: must be in (0, 1], a share of dense sampling")
    why = cache.why_not(probes.pipe)
    if why is not None:
        raise ValueError(f"cache: {cache.shown}: {why}")
    steps, most = probes.steps, target * (1 + SLACK)
    ratios = probes.calibrate() if cache.calibrated else None
    counted: dict[tuple[int, float], float] = {}

    def config(stage: int, x: float) -> Any:
        return cache.config(probes.pipe, steps, x, stage=stage, ratios=ratios)

    def cost(stage: int, x: float) -> float:
        key = stage, float(round(x) if cache.whole else x)
        if key not in counted:
            counted[key] = probes.cost(lambda: step_cache(probes.pipe, config(*key)))
        return counted[key]

    def found(key: tuple[int, float], note: str | None = None) -> Match:
        return Match(config(*key), key[1], counted[key], key[0], ratios, note)

    if value is not None:
        cost(0, value)
        return found((0, value))
    dearest, cheapest = cache.span(steps)

    def excess(x: float, stage: int) -> float:
        """Return the cost above the target; 0 where the search may end."""
        over = 1 - target if x == dearest else cost(stage, x) - target
        return 0.0 if abs(over) <= SLACK * target else over

    for stage in range(len(cache.stages)):
        if cost(stage, cheapest) > most:
            continue
        if excess(dearest, stage) == 0:
            cost(stage, dearest)
        elif excess(cheapest, stage) < 0:
            xtol = 0.5 if cache.whole else abs(cheapest - dearest) / 2**PROBES
            bisect(excess, dearest, cheapest, (stage,), xtol=xtol, maxiter=PROBES, disp=False)
        break
    within = {key: x for key, x in counted.items() if x <= most}
    if within:
        return found(min(within, key=lambda x: abs(within[x] - target)))
    key = min(counted, key=lambda x: counted[x])
    cheapest_cost = f"its cheapest setting costs {counted[key]:.3f}"
    return found(key, f"cannot reach the cost {target:.3f} of dense sampling: {cheapest_cost}")
