"""Names of a pipeline's transformers, and settings for each of them."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from torch import nn

TRANSFORMERS = ("transformer", "transformer_2")
"""Names of the attributes of a pipeline that are transformers. Wan2.2 has two, for high and for low noise levels."""


def parts_of(target: Any) -> dict[str, Any]:
    """Return the transformers of a pipeline with a `transformer_2`, by name. Return any other target as "transformer"."""
    if isinstance(target, nn.Module) or getattr(target, TRANSFORMERS[1], None) is None:
        return {TRANSFORMERS[0]: target}
    held = {name: getattr(target, name, None) for name in TRANSFORMERS}
    return {name: x for name, x in held.items() if x is not None}


def transformers_of(pipe: Any) -> list[Any]:
    """Return the transformers of a pipeline, in the order in which they run."""
    return [x for name in TRANSFORMERS if (x := getattr(pipe, name, None)) is not None]


def is_by_component(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value is a dict with settings for each transformer, and not a dict of fields."""
    return isinstance(value, Mapping) and not value.keys().isdisjoint(TRANSFORMERS)


def split(argument: str, value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of each transformer by name.

    Args:
        argument: name of the argument, for error messages.
        value: settings for all transformers, or a dict of settings by transformer. Transformers that the dict does not
            name are left out of the result.
        names: names of the transformers of the pipeline.

    Raises:
        ValueError: the dict has a key that is not the name of a transformer of the pipeline.
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
                f"{argument}: key {key!r} in settings by transformer; accepted are {', '.join(accepted)}, or fields only"
            )
    return dict(value)
