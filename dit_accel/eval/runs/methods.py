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
    """Way to sample, and the settings of its row in the table."""

    name: str  # name of the row
    kind: str  # one of `results.types.METHODS`
    sla: SLAConfig | SLACheckpoint | dict | None = None
    ras: RASConfig | None = None
    cache: Any = None  # a cache config of diffusers
    tuned: StepCache | None = None  # step cache whose config `rivals.choose_settings` makes
    value: float | None = None
    """Value of the setting of `tuned`. None: the value with which it costs as much as region-adaptive sampling."""
    cost: float | None = None  # counted FLOPs of the transformer over those of dense sampling
    num_inference_steps: int | None = None
    """None: as many as dense sampling; for `fewer_steps`: as many as take the time of each other method."""
    why: str | None = None  # reason why the method cannot run here
    settings: dict[str, Any] = field(default_factory=dict)  # settings that the row shows

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
        """True if this is dense sampling with fewer steps."""
        return self.kind == "fewer_steps"

    @property
    def at_equal_time(self) -> bool:
        """True if this is dense sampling with as many steps as take the time of each other method."""
        return self.fewer and self.num_inference_steps is None

    @property
    def runs(self) -> bool:
        """True if this is dense sampling or an accelerated method that can run here."""
        return self.why is None and not self.fewer

    def tried(self, pipe: Any, steps: int) -> "Method":
        """Enable the method once, and return it with its settings.

        Raises:
            ValueError: acceleration is on already, or the method cannot be enabled.
        """
        on = [key for key, x in acceleration_settings(pipe).items() if x is not None]
        if on:
            raise ValueError(f"pipe: {', '.join(on)} is on; disable it first")
        if self.why is not None:
            return self
        enabled = self.acceleration
        if self.tuned is not None:  # any setting shows whether the cache can be enabled
            enabled["cache"] = self.tuned.config(pipe, steps, self.value)
        with accelerated(pipe, **enabled):
            found = acceleration_settings(pipe)
        return replace(self, settings={k: x for k, x in found.items() if x is not None})


DENSE = Method(name="Dense", kind="dense")
AT_EQUAL_TIME = Method(name="Dense, fewer steps", kind="fewer_steps")
"""Dense sampling with as many steps as take the time of each other method."""


def dense_with(steps: int, **settings: Any) -> Method:
    """Return dense sampling with a number of steps."""
    name = f"Dense, {steps} {'step' if steps == 1 else 'steps'}"
    return Method(name=name, kind="fewer_steps", num_inference_steps=steps, settings=settings)


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

    methods = [DENSE]
    for name in names:
        what, _, setting = name.partition(":")
        if what == "dense" and not setting:
            continue
        if what == "fewer_steps":
            if setting and (not setting.isdecimal() or int(setting) < 1):
                raise ValueError(f"methods: {name!r}: must be a number of steps >= 1")
            methods.append(dense_with(int(setting)) if setting else AT_EQUAL_TIME)
        elif what in CACHES:
            cache, value = read_cache(name)
            shown, why = f"{cache.shown} {setting}".strip(), cache.why_not(pipe)
            methods.append(Method(name=shown, kind="cache", tuned=cache, value=value, why=why))
        elif what in ("ras", "sla", "ras_sla"):
            kinds = what.split("_")
            first, plus, second = setting.partition("+") if len(kinds) > 1 else (setting, "", "")
            given = {"ras": first or ras, "sla": (second if plus else first) or sla}
            chosen: dict[str, Any] = {
                x: RASConfig.load(given[x]) if x == "ras" else settings_of(given[x]) for x in kinds
            }
            if None in chosen.values():
                raise ValueError(f"methods: {name!r} is dense sampling; pass 'dense'")
            if crossover is not None and "sla" in chosen:
                chosen["sla"] = _with_crossover(chosen["sla"], crossover)
            labels = [_label(given[x]) for x in kinds]
            if labels[0] == labels[-1]:  # one name for both
                labels = [*[""] * (len(kinds) - 1), labels[0]]
            shown = " + ".join(f"{x.upper()}{y}" for x, y in zip(kinds, labels, strict=True))
            methods.append(Method(name=shown, kind=what, **chosen))
        else:
            accepted = ", ".join(dict.fromkeys(["dense", *DEFAULT, *CACHES]))
            raise ValueError(
                f"methods: unknown {name!r}: must be one of {accepted}, with a setting after a colon"
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
