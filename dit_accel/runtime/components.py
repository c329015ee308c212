"""Transformers of a pipeline by name, and settings that differ between them."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from torch import nn

TRANSFORMERS = ("transformer", "transformer_2")
"""Attributes of a pipeline that are transformers. Wan2.2 has two: one for high and one for low noise."""


def parts_of(target: Any) -> dict[str, Any]:
    """Return the transformers of a pipeline that has a `transformer_2`, by name; else the target as "transformer"."""
    if isinstance(target, nn.Module) or getattr(target, TRANSFORMERS[1], None) is None:
        return {TRANSFORMERS[0]: target}
    held = {name: getattr(target, name, None) for name in TRANSFORMERS}
    return {name: x for name, x in held.items() if x is not None}


def transformers_of(pipe: Any) -> list[Any]:
    """Return the transformers of a pipeline, in the order in which they run."""
    return [x for name in TRANSFORMERS if (x := getattr(pipe, name, None)) is not None]


def is_by_component(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether settings are a dict by the name of the transformer, rather than a dict of fields."""
    return isinstance(value, Mapping) and not value.keys().isdisjoint(TRANSFORMERS)


def split(argument: str, value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of each transformer by name: one setting for all of them, or the entries of a dict.

    Args:
        argument: name of the argument, for messages.
        value: settings, or a dict of them by the name of the transformer. A transformer that is not in it is left out.
        names: names of the transformers that there are.

    Raises:
        ValueError: the dict has another key.
    """
    accepted = list(names)
    if not is_by_component(value):
        return dict.fromkeys(accepted, value)
    for key in value:
        if key in TRANSFORMERS and key not in accepted:
            raise ValueError(
                f"{argument}: settings for {key!r}, which the pipeline does not have; accepted are {', '.join(accepted)}"
            )
        if key not in TRANSFORMERS:
            raise ValueError(
                f"{argument}: key {key!r} beside settings by transformer; accepted are {', '.join(accepted)}, or fields "
                "without them"
            )
    return dict(value)
