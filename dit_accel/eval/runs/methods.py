"""The ways to sample that an evaluation compares, by name: `ras:fast`, `first_block_cache:0.1`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dit_accel.checkpoint.file import SLACheckpoint, settings_of
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.runs.caches import CACHES, StepCache, read_cache
from dit_accel.sampling.acceleration import accelerated, acceleration_settings
from dit_accel.sampling.names import safe_name

DEFAULT = ("fewer_steps", "first_block_cache", "sea_cache", "ras", "sla", "ras_sla")
"""Methods that are compared with dense sampling by default."""
Crossover = Literal["auto", "never"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to sample, and the settings of its row in the table."""

    name: str
    """Name of the row."""
    kind: str
    """One of `results.types.METHODS`."""
    sla: SLAConfig | SLACheckpoint | dict | None = None
    ras: RASConfig | None = None
    cache: Any = None
    """A cache config of diffusers."""
    tuned: StepCache | None = None
    """Step cache whose config `rivals.choose_settings` makes."""
    value: float | None = None
    """Value of the setting of `tuned`. None: the value with which it costs as much as region-adaptive sampling."""
    cost: float | None = None
    """Counted FLOPs of the transformer over those of dense sampling. None: not counted."""
    num_inference_steps: int | None = None
    """None: as many as dense sampling; for `fewer_steps`: as many as take the time of each other method."""
    why: str | None = None
    """Reason why the method cannot run here."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that the row shows."""

    @property
    def folder(self) -> str:
        """Name of the folder of its samples."""
        return safe_name(re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-."))

    @property
    def acceleration(self) -> dict[str, Any]:
        """Arguments of `acceleration.accelerated`."""
        return {"sla": self.sla, "ras": self.ras, "cache": self.cache}

    @property
    def fewer(self) -> bool:
        """Whether this is dense sampling with fewer steps."""
        return self.kind == "fewer_steps"


DENSE = Method(name="Dense", kind="dense")


def dense_with(steps: int, **settings: Any) -> Method:
    """Return dense sampling with a number of steps."""
    name = f"Dense, {steps} {'step' if steps == 1 else 'steps'}"
    return Method(name=name, kind="fewer_steps", num_inference_steps=steps, settings=settings)


def runnable(methods: Sequence[Method]) -> list[Method]:
    """Return dense sampling and the accelerated methods that can run here."""
    return [x for x in methods if x.why is None and not x.fewer]


def read_methods(
    names: Sequence[str],
    pipe: Any,
    *,
    steps: int,
    sla: SLAConfig | SLACheckpoint | dict | str = "balanced",
    ras: RASConfig | str = "balanced",
    crossover: Crossover | None = None,
) -> list[Method]:
    """Return dense sampling and the methods of these names.

    - `fewer_steps`: dense sampling in the time of each other method; `fewer_steps:8` takes 8 steps.
    - `first_block_cache`, `sea_cache`, `mag_cache`, `taylorseer`, `pab`, `faster_cache`: step caches of diffusers at
      the cost of region-adaptive sampling; `first_block_cache:0.1` sets the threshold.
    - `ras`, `sla`: `ras:fast` takes a preset or a YAML file, `sla:` also a folder with sla.safetensors.
    - `ras_sla`: both; `ras_sla:fast+quality` takes one setting for each, `ras_sla:fast` one for both.

    Args:
        names: names of the methods.
        pipe: a pipeline or its outline, which decides whether a step cache can run.
        steps: number of steps of dense sampling.
        sla, ras: settings of names without a setting.
        crossover: replaces the crossover of all sparse attention.

    Raises:
        ValueError: an unknown name or setting, two methods of one name, or `fewer_steps` with no fewer steps.
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
        what, _, setting = name.partition(":")
        if what == "dense" and not setting:
            continue
        if what == "fewer_steps":
            methods.append(_fewer(setting))
        elif what in CACHES:
            cache, value = read_cache(name)
            shown, why = f"{cache.shown} {setting}".strip(), cache.why_not_on(pipe)
            methods.append(Method(name=shown, kind="cache", tuned=cache, value=value, why=why))
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
            accepted = ", ".join(dict.fromkeys(["dense", *DEFAULT, *CACHES]))
            raise ValueError(
                f"methods: unknown {name!r}; accepted are {accepted}, with a setting after a colon"
            )
    folders = [x.folder for x in methods]
    for i, method in enumerate(methods):
        if method.folder in folders[:i]:
            raise ValueError(f"methods: {method.name!r} comes twice; give each method once")
        if method.fewer and steps <= (method.num_inference_steps or 1):
            raise ValueError(
                f"methods: {method.name!r}: must be fewer than num_inference_steps={steps} of dense sampling"
            )
    return methods


def with_settings(pipe: Any, methods: Sequence[Method], steps: int) -> list[Method]:
    """Enable each method once, and return the methods with their settings.

    Args:
        pipe: a loaded pipeline without acceleration.
        methods: methods to try, except those that cannot run here.
        steps: number of steps of dense sampling.

    Raises:
        ValueError: acceleration is on already, or a method cannot be enabled.
    """
    on = [key for key, x in acceleration_settings(pipe).items() if x is not None]
    if on:
        raise ValueError(
            f"pipe: {', '.join(on)} is on; accepted is a pipeline without acceleration"
        )
    out = []
    for method in methods:
        found: dict[str, Any] = {}
        if method.why is None:
            tried = method.acceleration
            if method.tuned is not None:  # any setting shows whether the cache can be enabled
                tried["cache"] = method.tuned.config(pipe, steps, method.value)
            with accelerated(pipe, **tried):
                found = acceleration_settings(pipe)
        shown = {k: x for k, x in found.items() if x is not None}
        out.append(replace(method, settings=shown))
    return out


def _fewer(setting: str) -> Method:
    if not setting:
        return Method(name="Dense, fewer steps", kind="fewer_steps")
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"methods: 'fewer_steps:{setting}': must be a number of steps >= 1")
    return dense_with(int(setting))


def _with_crossover(settings: Any, crossover: Crossover) -> Any:
    if isinstance(settings, dict):  # settings by transformer
        return {name: _with_crossover(x, crossover) for name, x in settings.items()}
    if isinstance(settings, SLACheckpoint):
        return replace(settings, config=replace(settings.config, crossover=crossover))
    return replace(settings, crossover=crossover)


def _label(settings: Any) -> str:
    """Return the name of a preset or file, after a space; nothing for other settings."""
    if isinstance(settings, SLACheckpoint):
        return " with its weights"
    return f" {Path(settings).stem}" if isinstance(settings, str) else ""
