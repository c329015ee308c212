"""`accelerate`: enable the settings with which a pipeline was loaded."""

import functools
import inspect
from typing import Any

from dit_accel import control
from dit_accel.config import OFF
from dit_accel.pipelines.arguments import Settings, read_settings
from dit_accel.runtime.components import is_by_component, parts_of, split
from dit_accel.runtime.install import installations_of


def accelerate(pipe: Any, settings: Settings, defaults: Settings | None = None) -> Any:
    """Enable the methods that have settings, disable those with None, and return the pipeline.

    Args:
        pipe: a loaded pipeline. Its transformer may be accelerated already, if it is shared.
        settings: settings of the caller, which replace those of methods that are on. Other methods are unchanged.
        defaults: settings of methods that are not in `settings`, used if acceleration is off.

    Raises:
        ValueError: the transformer does not support the settings. It is unchanged then.
    """
    parts, on = parts_of(pipe), bool(installations_of(pipe))
    wanted: dict[str, dict[str, Any]] = {}
    for name, x in ({} if on else defaults or {}).items():
        known = {k: v for k, v in x.items() if k in parts} if is_by_component(x) else x
        wanted[name] = split(name, known, parts)
    for name, x in settings.items():
        wanted[name] = wanted.get(name, {}) | split(name, x, parts)
    given = {
        name: {part: OFF if x is None else x for part, x in of.items() if on or x is not None}
        for name, of in wanted.items()
    }
    if given := {name: of for name, of in given.items() if of}:
        control.enable(pipe, **given)
    return pipe


def accelerated_init(init: Any) -> Any:
    """Return a diffusers constructor with the additional keywords `sla` and `ras`, both off by default.

    They are off by default because diffusers calls the constructor in every function that loads a pipeline, and the
    loading functions of the sparse pipelines enable the methods afterwards.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def accelerated(self: Any, *args: Any, sla: Any = None, ras: Any = None, **kwargs: Any) -> None:
        settings = read_settings(sla, ras)
        init(self, *args, **kwargs)
        accelerate(self, {name: x for name, x in settings.items() if x is not None})

    # diffusers reads the names of the components from the signature. Parameters with a default are no components.
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("sla", "ras")
    ]
    accelerated.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *options]
    )
    return accelerated
