"""`choose_settings`: gives each step cache of an evaluation the setting with which it costs what our row costs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_accel.environment import versions
from dit_accel.eval.runs.lineup import Lineup
from dit_accel.eval.runs.log import Log
from dit_accel.eval.runs.match import Probes, match_cost
from dit_accel.eval.runs.methods import Method
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.acceleration import accelerated, acceleration_settings, weights_sha256
from dit_accel.sampling.batches import quiet
from dit_accel.sampling.call import run_latents
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.prompt_sets import load_prompts
from dit_accel.sampling.prompts import PromptRecord

TARGET = 0.65
"""Cost, as a share of dense sampling, where no row of region-adaptive sampling is compared."""
PROBES = 2
"""Samples on which costs are counted."""
MATCHES = "matches.json"


def choose_settings(
    lineup: Lineup,
    pipe: Any,
    samples: Sequence[Sample],
    *,
    prompts: Sequence[PromptRecord] = (),
    count: int = PROBES,
    folder: Path | None = None,
    progress: bool = False,
) -> Lineup:
    """Return the methods with the settings of their step caches; costs are counted on other samples than are compared.

    Args:
        lineup: methods of the evaluation.
        pipe: a loaded pipeline without acceleration.
        samples: samples that are compared.
        prompts: prompts to count costs with. Default: those of the shipped set "smoke". Prompts that are compared are
            left out.
        count: number of samples on which costs are counted.
        folder: where found settings are kept, so that a run that goes on does not search again.
        progress: name each cache on stderr.
    """
    if not any(x.tuned for x in lineup.runnable):
        return lineup
    scale = samples[0].sampling.guidance_scale
    whys = {x.name: x.tuned.why_not_on(pipe, scale) for x in lineup.runnable if x.tuned}
    tuned = [x for x in lineup.runnable if x.tuned and whys[x.name] is None]
    ours = next((x for x in lineup.runnable if x.kind == "ras"), None)
    others = probe_samples(samples, prompts, count)
    probes = Probes(
        pipe, lambda rows: run_latents(pipe, [others[i] for i in rows]), range(len(others))
    )
    about = {
        "weights": weights_sha256(pipe),
        "dtype": str(transformers_of(pipe)[0].dtype),
        "versions": versions(),
        "samples": [(x.record.prompt, x.seed, x.sampling.call_arguments()) for x in others],
        "target": TARGET if ours is None else lineup.settings[ours.name],
    }
    log = None
    if folder is not None:
        dropped = "settings of step caches are searched anew"
        log = Log(folder / MATCHES, about, kind="found", dropped=dropped)
        folder.mkdir(parents=True, exist_ok=True)
    found = {} if log is None else log.results
    missing = [x for x in tuned if x.name not in found]
    with quiet(pipe):
        target = TARGET if ours is None or not missing else _cost_of(ours, probes)
        for method in missing:
            assert method.tuned is not None
            if progress:
                sys.stderr.write(f"{method.name}: counting cost\n")
            match = match_cost(probes, method.tuned, target, value=method.value)
            record = {k: x for k, x in vars(match).items() if k != "config"}
            found[method.name] = {"target": target, "calls": probes.steps, **record}
            if log is not None:
                log.write()
    chosen = {x.name: _with_setting(x, pipe, found[x.name]) for x in tuned}
    chosen |= {
        x.name: replace(x, tuned=None, why=whys[x.name])
        for x in lineup.runnable
        if whys.get(x.name) is not None
    }
    settings = {x.name: _shown(chosen[x.name], pipe, found[x.name]) for x in tuned}
    return replace(
        lineup,
        runnable=[x for y in lineup.runnable if (x := chosen.get(y.name, y)).why is None],
        accelerated=[chosen.get(x.name, x) for x in lineup.accelerated],
        settings=lineup.settings | settings,
    )


def _with_setting(method: Method, pipe: Any, found: Mapping[str, Any]) -> Method:
    """Return the method with its step cache, from an entry of matches.json."""
    cache, value, cost = method.tuned, found["value"], found["cost"]
    assert cache is not None
    config = cache.config(pipe, found["calls"], value, stage=found["stage"], ratios=found["ratios"])
    note = f"costs {cost:.3f} of dense sampling by counted FLOPs"
    if method.value is None:
        note = f"{cache.setting} {value:.4g} found by search, {note}, target {found['target']:.3f}"
    if found["note"]:
        note += f"; {found['note']}"
    return replace(method, cache=config, tuned=None, value=value, cost=cost, note=note)


def _shown(method: Method, pipe: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the row shows."""
    with accelerated(pipe, cache=method.cache):
        cache = acceleration_settings(pipe)["cache"]
    return {"cache": cache, "matched": {k: found[k] for k in ("target", "value", "cost", "note")}}


def probe_samples(
    samples: Sequence[Sample], prompts: Sequence[PromptRecord], count: int
) -> list[Sample]:
    """Return samples like the first of `samples`, of prompts and seeds that none of them has."""
    compared = {x.record.prompt for x in samples}
    texts = [x.prompt for x in (*prompts, *load_prompts("smoke")) if x.prompt not in compared]
    seed = max(x.seed for x in samples) + 1
    first = samples[0]
    return [
        replace(first, record=replace(first.record, prompt=text), seed=(seed + i) % 2**63)
        for i, text in enumerate(texts[:count])
    ]


def _cost_of(method: Method, probes: Probes) -> float:
    """Return the counted cost of a method that is no step cache."""
    return min(1.0, probes.cost(lambda: accelerated(probes.pipe, **method.acceleration)))
