"""Conversion of cache layers to tensors and plain JSON values, for files."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from dit_accel.llm.kvcache.clusters import Clusters
from dit_accel.llm.kvcache.part import Part

LAYER = ("exact", "length", "sinks", "positions", "stored", "calls", "read")
"""Attributes of a `ZoneLayer` that hold its state."""
KINDS: dict[str, Any] = {"Part": Part, "Clusters": Clusters}
"""Dataclasses that stores and selectors may hold."""


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value in a form that JSON can hold, and add its tensors to `tensors` under names that start with `name`.

    Raises:
        ValueError: the type of the value is not supported.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in KINDS.values():
        inner = {x.name: getattr(value, x.name) for x in fields(value)}
        return {type(value).__name__: packed(inner, name, tensors)}
    if isinstance(value, list | tuple):
        each = [packed(x, f"{name}.{i}", tensors) for i, x in enumerate(value)]
        return each if isinstance(value, list) else {"tuple": each}
    if isinstance(value, Mapping):
        return {"items": {str(k): packed(x, f"{name}.{k}", tensors) for k, x in value.items()}}
    raise ValueError(f"{name}: a {type(value).__name__} cannot be saved")


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the original value from the output of `packed`."""
    if isinstance(value, list):
        return [unpacked(x, tensors) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "tuple":
        return tuple(unpacked(inner, tensors))
    if kind in KINDS:
        return KINDS[kind](**unpacked(inner, tensors))
    return {k: unpacked(x, tensors) for k, x in inner.items()}


def changing(owner: Any) -> list[str]:
    """Return the names of the fields of a store or selector that hold its state."""
    settled = {x for kind in type(owner).__mro__ for x in vars(kind).get("settled", ())}
    return [x.name for x in fields(owner) if not x.init and x.name not in settled]
