"""Checks of the arguments of loading functions; they run before files are read."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from dit_accel.checkpoint.file import SLACheckpoint, settings_of
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.config.base import suggest
from dit_accel.runtime.components import TRANSFORMERS, is_by_component, split

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
DEFAULT: Any = object()
"""Default of `sla` and `ras` in functions in which None means off."""
OneSetting = SLAConfig | SLACheckpoint | RASConfig | None
Settings = dict[str, OneSetting | dict[str, OneSetting]]
"""Settings by the name of the method: a config, a dict of configs by transformer, or None to switch the method off.
Methods and transformers that are not named are unchanged."""


def read_settings(sla: Any, ras: Any) -> Settings:
    """Return the settings of the methods that were passed; `DEFAULT` means not passed.

    Raises:
        ValueError: `settings_of` or `RASConfig.load` does not accept them.
    """
    settings: Settings = {}
    for method, given, read in (("sla", sla, settings_of), ("ras", ras, RASConfig.load)):
        if given is DEFAULT:
            continue
        chosen: Any = given if is_by_component(given) else read(given)
        if is_by_component(chosen):
            chosen = {name: read(x) for name, x in split(method, chosen, TRANSFORMERS).items()}
        settings[method] = chosen
    return settings


def with_dtypes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with names of dtypes ("bf16", "float16") replaced by the dtypes.

    diffusers falls back to float32 for values that are neither a dtype nor a dict of dtypes by component.

    Raises:
        ValueError: `dtype` or `torch_dtype` has another value, or both are passed.
    """
    changed = dict(arguments)
    given = [key for key in ("dtype", "torch_dtype") if changed.get(key) is not None]
    if len(given) > 1:
        raise ValueError(
            f"dtype={changed['dtype']!r}, torch_dtype={changed['torch_dtype']!r}: accepted is one of them"
        )
    for key in given:
        value = changed[key]
        if isinstance(value, dict):
            changed[key] = {part: _dtype(f"{key}[{part!r}]", x) for part, x in value.items()}
        else:
            changed[key] = _dtype(key, value)
    return changed


def _dtype(name: str, value: Any) -> torch.dtype:
    found = DTYPES.get(value) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        hint = suggest(value, list(DTYPES)) if isinstance(value, str) else ""
        raise ValueError(
            f"{name}={value!r}: not a dtype{hint}; accepted are a torch.dtype, {', '.join(DTYPES)}, or a dict of them by "
            "component"
        )
    return found


def check_keywords(
    cls: type, given: Mapping[str, Any], *loaders: Callable[..., Any], more: Collection[str] = ()
) -> None:
    """Refuse keyword arguments that diffusers would ignore.

    Args:
        cls: pipeline class; the parameters of its constructor are accepted.
        given: keyword arguments.
        loaders: functions of diffusers that read keywords from their **kwargs. diffusers has no list of these keywords,
            so every identifier among the string constants of their code is accepted.
        more: further accepted keywords.

    Raises:
        ValueError: a keyword is not accepted.
    """
    accepted = {*inspect.signature(cls).parameters, *more}
    for loader in loaders:
        constants = inspect.unwrap(getattr(loader, "__func__", loader)).__code__.co_consts
        accepted |= {x for x in constants if isinstance(x, str) and x.isidentifier()}
    for key, value in given.items():
        if key not in accepted:
            raise ValueError(
                f"{key}={value!r:.60}: unknown keyword{suggest(key, sorted(accepted))}; accepted are sla, ras and the "
                "keywords of the diffusers parent"
            )
