"""Context manager that enables acceleration for one run, and the settings of that acceleration as plain values."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from dit_accel import control
from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import identity_of, weights_of
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.runtime.components import parts_of, transformers_of
from dit_accel.runtime.install import installations_of, method_of
from dit_accel.sampling.quantize import quantized_as
from dit_accel.sampling.step_caches import step_cache
from dit_accel.tensor_files import digest


@contextlib.contextmanager
def accelerated(
    pipe: Any,
    *,
    sla: SLAConfig | SLACheckpoint | dict | str | None = None,
    ras: RASConfig | dict | str | None = None,
    cache: Any = None,
) -> Iterator[None]:
    """Enable sparse attention, region-adaptive sampling or a step cache of diffusers, and disable it on exit.

    Args:
        pipe: a loaded pipeline.
        sla, ras: settings, as in `dit_accel.enable`. None leaves the method as it is.
        cache: a cache config of diffusers. None leaves the pipeline without a cache.

    Raises:
        ValueError: the settings are invalid, acceleration is already enabled, or diffusers has no step cache for
            this model.
    """
    if (sla is not None or ras is not None) and installations_of(pipe):
        raise ValueError("sla, ras: acceleration is already enabled; call pipe.disable() first")
    with contextlib.ExitStack() as on:
        if sla is not None or ras is not None:
            on.callback(control.disable, pipe)
            control.enable(pipe, sla=sla, ras=ras)
        if cache is not None:
            on.enter_context(step_cache(pipe, cache))
        yield


def acceleration_settings(pipe: Any) -> dict[str, Any]:
    """Return the settings of the enabled methods as plain values for JSON.

    Returns:
        The keys "sla", "ras" and "cache", each with its settings or None, and "quantize" for a quantised transformer.
        If a pipeline has two transformers with different settings, the value is a dict by transformer.
    """
    each = {name: _settings(getattr(pipe, name, x)) for name, x in parts_of(pipe).items()}
    if len(each) == 1:
        return next(iter(each.values()))
    settings = {}
    for method in dict.fromkeys(key for x in each.values() for key in x):
        found = {name: x.get(method) for name, x in each.items()}
        first, *others = found.values()
        settings[method] = first if all(x == first for x in others) else found
    return settings


def _settings(transformer: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"sla": None, "ras": None, "cache": None}
    sla, ras = (method_of(transformer, name) for name in ("sla", "ras"))
    if sla is not None:
        settings["sla"] = sla.config.to_dict()
        if sla.config.has_weights:
            weights = {
                f"{layer}.{name}": x.float()
                for layer, module in sla.attention.items()
                for name, x in weights_of(module).items()
            }
            settings["sla"]["weights_sha256"] = digest({}, weights)
        if sla.swap is not None:
            settings["sla"]["transformer_sha256"] = sla.swap.digest
    if ras is not None:
        settings["ras"] = ras.config.to_dict()
    if (cache := getattr(transformer, "_cache_config", None)) is not None:
        values = {x.name: _plain(getattr(cache, x.name)) for x in dataclasses.fields(cache)}
        settings["cache"] = {"name": type(cache).__name__.removesuffix("Config")} | {
            k: x for k, x in values.items() if x is not _OPAQUE
        }
    if (quantized := quantized_as(transformer)) is not None:
        settings["quantize"] = quantized
    return settings


_OPAQUE: Any = object()
"""Marker for a value that JSON cannot hold, such as a callback."""


def _plain(value: Any) -> Any:
    """Return a value of a cache config as plain values for JSON, or `_OPAQUE`."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value if value is None or isinstance(value, bool | int | float | str) else _OPAQUE


def weights_sha256(pipe: Any) -> str:
    """Return a hash of some weights of each layer of the transformers. It does not depend on their dtype."""
    fingerprint = torch.cat([identity_of(x).fingerprint for x in transformers_of(pipe)])
    return hashlib.sha256(fingerprint.to(torch.float32).numpy().tobytes()).hexdigest()
