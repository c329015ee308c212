"""One file per model family: its facts and its one attention processor."""

import importlib
from types import ModuleType

from torch import nn

FAMILIES = {"WanTransformer3DModel": "dit_accel.models.wan"}


def family_of(transformer: nn.Module) -> ModuleType:
    """The module that knows this transformer.

    Raises:
        ValueError: no family for its class.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in FAMILIES:
            return importlib.import_module(FAMILIES[cls.__name__])
    raise ValueError(
        f"pipe.transformer: {type(transformer).__name__}; accepted are {', '.join(FAMILIES)}"
    )
