"""The ways to sample that an evaluation compares, by name: `ras:fast`, `first_block_cache:0.1`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dit_accel.checkpoint.file import SLACheckpoint, settings_of
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.runs.caches import CACHES, StepCache, read_cache
from dit_accel.sampling.acceleration import accelerated, acceleration_settings
from dit_accel.sampling.names import safe_name

DEFAULT = ("fewer_steps", "first_block_cache", "sea_cache", "ras", "sla", "ras_sla")
"""What is compared with dense sampling unless the caller says otherwise."""
Crossover = Literal["auto", "never"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to sample: a row of the table."""

    name: str
    """Of the row."""
    kind: str
    """One of `results.types.METHODS`."""
    sla: SLAConfig | SLACheckpoint | dict | None = None
    ras: RASConfig | None = None
    cache: Any = None
    """A cache config of diffusers."""
    tuned: StepCache | None = None
    """Step cache that `rivals.choose_settings` makes `cache` of, with the setting `value`."""
    value: float | None = None
    """None: the value with which the cache costs as much as our row."""
    cost: float | None = None
    """Counted FLOPs of the transformer over those of dense sampling, where they were counted."""
    num_inference_steps: int | None = None
    """None: as many as dense sampling; of `fewer_steps`: as many as take the time of another row."""
    why: str | None = None
    """Why it cannot run here."""
    note: str | None = None
    """What a reader of the row must know."""

    @property
    def folder(self) -> str:
        """Of its samples: the name in plain letters."""
        return safe_name(re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-."))

    @property
    def acceleration(self) -> dict[str, Any]:
        """Arguments of `acceleration.accelerated`."""
        return {"sla": self.sla, "ras": self.ras, "cache": self.cache}


DENSE = Method(name="Dense", kind="dense")


def dense_with(steps: int) -> Method:
    """Dense sampling with so many steps."""
    word = "step" if steps == 1 else "steps"
    return Method(name=f"Dense, {steps} {word}", kind="fewer_steps", num_inference_steps=steps)


def read_methods(
    names: Sequence[str | Method],
    pipe: Any,
    *,
    sla: SLAConfig | SLACheckpoint | dict | str = "balanced",
    ras: RASConfig | str = "balanced",
    crossover: Crossover | None = None,
) -> list[Method]:
    """Methods from their names; dense sampling comes first, whatever the names.

    - `fewer_steps`: dense sampling at the time of each of the others; `fewer_steps:8` with 8 steps.
    - `first_block_cache`, `sea_cache`, `mag_cache`, `taylorseer`, `pab`, `faster_cache`: step caches of diffusers at
      the cost of our row; `first_block_cache:0.1` sets the threshold.
    - `ras`, `sla`: `ras:fast` takes a preset or a YAML file, `sla:` also a folder with sla.safetensors.
    - `ras_sla`: both; `ras_sla:fast+quality` takes one setting each, `ras_sla:fast` one for both.

    Args:
        pipe: what decides whether a step cache is available.
        sla, ras: settings where the name gives none.
        crossover: overrides that of all sparse attention.

    Raises:
        ValueError: an unknown name or setting, or two methods of one name.
    """

    def sparse(setting: str) -> tuple[str, SLAConfig | SLACheckpoint | dict]:
        chosen = settings_of(setting or sla)
        if chosen is None:
            raise ValueError("methods: 'sla:none' is dense sampling; accepted is dense")
        if crossover is not None:
            chosen = _with_crossover(chosen, crossover)
        return _label(setting or sla), chosen

    def regions(setting: str) -> tuple[str, RASConfig]:
        chosen = RASConfig.load(setting or ras)
        if chosen is None:
            raise ValueError("methods: 'ras:none' is dense sampling; accepted is dense")
        return _label(setting or ras), chosen

    methods = [DENSE]
    for name in names:
        if isinstance(name, Method):
            steps = name.num_inference_steps if name.kind == "fewer_steps" else None
            methods.append(name if steps is None else dense_with(steps))
            continue
        what, _, setting = name.partition(":")
        if what == "dense" and not setting:
            continue
        if what == "fewer_steps":
            methods.append(_fewer(setting))
        elif what in CACHES:
            methods.append(_cached(name, pipe))
        elif what == "ras":
            label, chosen = regions(setting)
            methods.append(Method(name=f"RAS{label}", kind="ras", ras=chosen))
        elif what == "sla":
            label, attention = sparse(setting)
            methods.append(Method(name=f"SLA{label}", kind="sla", sla=attention))
        elif what == "ras_sla":
            first, plus, second = setting.partition("+")
            (label, chosen), (other, attention) = regions(first), sparse(second if plus else first)
            shown = f"RAS + SLA{label}" if label == other else f"RAS{label} + SLA{other}"
            methods.append(Method(name=shown, kind="ras_sla", ras=chosen, sla=attention))
        else:
            raise ValueError(
                f"methods: {name!r} is none; accepted are dense, {', '.join(dict.fromkeys([*DEFAULT, *CACHES]))}, "
                "with a setting after a colon"
            )
    folders = [x.folder for x in methods]
    for i, method in enumerate(methods):
        if method.folder in folders[:i]:
            raise ValueError(f"methods: {method.name!r} comes twice; accepted are different names")
    return methods


def check_methods(pipe: Any, methods: Sequence[Method], steps: int) -> dict[str, dict[str, Any]]:
    """Put each method on once.

    Args:
        methods: that can run here.
        steps: of dense sampling.

    Returns:
        By name what is shown of their settings.

    Raises:
        ValueError: something is on already, or one cannot be put on, or takes no fewer steps than dense
            sampling.
    """
    found = acceleration_settings(pipe)
    if any(x is not None for x in found.values()):
        on = ", ".join(key for key, x in found.items() if x is not None)
        raise ValueError(f"pipe: {on} is on; accepted is a pipeline without acceleration")
    check_fewer(methods, steps)
    out: dict[str, dict[str, Any]] = {}
    for method in methods:
        tried = method.acceleration
        if method.tuned is not None:  # whether it can be put on does not depend on the setting
            tried["cache"] = method.tuned.config(pipe, steps, method.value)
        with accelerated(pipe, **tried):
            settings = acceleration_settings(pipe)
        out[method.name] = {k: x for k, x in settings.items() if x is not None}
    return out


def check_fewer(methods: Sequence[Method], steps: int) -> None:
    """Raise ValueError for dense sampling with fewer steps that takes no fewer than dense sampling's `steps`."""
    for method in methods:
        if method.kind == "fewer_steps" and steps <= (method.num_inference_steps or 1):
            raise ValueError(
                f"methods: {method.name!r}: num_inference_steps={steps} of dense sampling are no more; "
                "accepted are fewer steps than those"
            )


def _fewer(setting: str) -> Method:
    if not setting:
        return Method(name="Dense, fewer steps", kind="fewer_steps")
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"methods: 'fewer_steps:{setting}': accepted is a number of steps >= 1")
    return dense_with(int(setting))


def _cached(name: str, pipe: Any) -> Method:
    cache, value = read_cache(name)
    shown = f"{cache.shown} {name.partition(':')[2]}".strip()
    why = cache.why_not_on(pipe)
    return Method(name=shown, kind="cache", tuned=cache, value=value, why=why)


def _with_crossover(settings: Any, crossover: Crossover) -> Any:
    if isinstance(settings, dict):  # by transformer
        return {name: _with_crossover(x, crossover) for name, x in settings.items()}
    if isinstance(settings, SLACheckpoint):
        return replace(settings, config=replace(settings.config, crossover=crossover))
    return replace(settings, crossover=crossover)


def _label(settings: Any) -> str:
    """What tells the settings apart, with a space before it; nothing where only their fields could."""
    if isinstance(settings, SLACheckpoint):
        return " with its weights"
    return f" {Path(settings).stem}" if isinstance(settings, str) else ""
