"""`choose_settings`: the setting of each step cache with which it costs as much as region-adaptive sampling."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_accel.environment import versions
from dit_accel.eval.runs.match import Probes, match_cost
from dit_accel.eval.runs.methods import Method
from dit_accel.eval.runs.timing import Log
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.acceleration import accelerated, acceleration_settings, weights_sha256
from dit_accel.sampling.batches import quiet
from dit_accel.sampling.call import run_latents
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.prompt_sets import load_prompts
from dit_accel.sampling.prompts import PromptRecord

TARGET = 0.65
"""Cost as a share of dense sampling, if no row of region-adaptive sampling is compared."""
PROBES = 2
"""Number of samples on which costs are counted."""
MATCHES = "matches.json"


def choose_settings(
    methods: Sequence[Method],
    pipe: Any,
    samples: Sequence[Sample],
    *,
    prompts: Sequence[PromptRecord] = (),
    count: int = PROBES,
    folder: Path | None = None,
    progress: bool = False,
) -> list[Method]:
    """Return the methods with the configs of their step caches. Costs are counted on samples that are not compared.

    Args:
        methods: methods with settings, see `methods.Method.tried`.
        pipe: a loaded pipeline without acceleration.
        samples: samples that are compared.
        prompts: prompts to count costs with, before those of the shipped set "smoke".
        count: number of samples on which costs are counted.
        folder: folder of matches.json, so that a run that goes on does not search again. Default: not kept.
        progress: name each cache on stderr.
    """
    if not any(x.tuned and x.runs for x in methods):
        return list(methods)
    scale = samples[0].sampling.guidance_scale
    whys = {x.name: x.why or x.tuned.why_not(pipe, scale) for x in methods if x.tuned}
    ours = next((x for x in methods if x.kind == "ras"), None)
    others = probe_samples(samples, prompts, count)
    probes = Probes(
        pipe, lambda rows: run_latents(pipe, [others[i] for i in rows]), range(len(others))
    )
    about = {
        "weights": weights_sha256(pipe),
        "dtype": str(transformers_of(pipe)[0].dtype),
        "versions": versions(),
        "samples": [(x.record.prompt, x.seed, x.sampling.call_arguments()) for x in others],
        "target": TARGET if ours is None else ours.settings,
    }
    log = None if folder is None else Log(folder / MATCHES, about, "found")
    found: dict[str, Any] = {} if log is None else log.results
    tuned = {x.name: x.tuned for x in methods if x.tuned and whys[x.name] is None}
    missing = [x for x in methods if x.name in tuned and x.name not in found]
    with quiet(pipe):
        target = TARGET
        if ours is not None and missing:
            cost = probes.cost(lambda: accelerated(pipe, **ours.acceleration))
            target = min(1.0, cost)
        for method in missing:
            if progress:
                sys.stderr.write(f"{method.name}: counting cost\n")
            match = match_cost(probes, tuned[method.name], target, value=method.value)
            record = {k: x for k, x in vars(match).items() if k != "config"}
            found[method.name] = {"target": target, "calls": probes.steps, **record}
            if log is not None:
                log.write()
    return [
        _with_cache(x, pipe, found[x.name])
        if x.name in tuned
        else replace(x, tuned=None, why=whys.get(x.name, x.why))
        for x in methods
    ]


def _with_cache(method: Method, pipe: Any, found: Mapping[str, Any]) -> Method:
    """Return the method with the config of its step cache, from an entry of matches.json."""
    cache, value, cost = method.tuned, found["value"], found["cost"]
    assert cache is not None
    config = cache.config(pipe, found["calls"], value, stage=found["stage"], ratios=found["ratios"])
    note = f"costs {cost:.3f} of dense sampling by counted FLOPs"
    if method.value is None:
        note = f"{cache.setting} {value:.4g} found by search, {note}, target {found['target']:.3f}"
    if found["note"]:
        note += f"; {found['note']}"
    with accelerated(pipe, cache=config):
        shown = acceleration_settings(pipe)["cache"]
    matched = {k: found[k] for k in ("target", "value", "cost", "note")}
    settings = {"cache": shown, "matched": matched, "note": note}
    return replace(method, cache=config, tuned=None, value=value, cost=cost, settings=settings)


def probe_samples(
    samples: Sequence[Sample], prompts: Sequence[PromptRecord], count: int
) -> list[Sample]:
    """Return samples like the first of `samples`, with prompts and seeds that none of them has."""
    compared = {x.record.prompt for x in samples}
    texts = [x.prompt for x in (*prompts, *load_prompts("smoke")) if x.prompt not in compared]
    seed = max(x.seed for x in samples) + 1
    first = samples[0]
    return [
        replace(first, record=replace(first.record, prompt=text), seed=(seed + i) % 2**63)
        for i, text in enumerate(texts[:count])
    ]
