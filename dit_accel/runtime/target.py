"""`transformer_of`: the transformer in a pipeline, in a wrapper, or the transformer itself."""

import inspect
from typing import Any

from torch import nn

from dit_accel.models import FAMILIES, family_of, is_supported
from dit_accel.runtime.components import transformers_of


def module_of(target: Any) -> nn.Module | None:
    """Return a module itself, or the first transformer of a pipeline; None if the pipeline has none."""
    if isinstance(target, nn.Module):
        return target
    return next((x for x in transformers_of(target) if isinstance(x, nn.Module)), None)


def transformer_of(target: Any, *, any_model: bool = False) -> Any:
    """Return the transformer of a target. If a pipeline has two transformers, return the first one.

    Args:
        target: a transformer, a wrapper of one (DDP, PEFT, torch.compile), or a pipeline.
        any_model: whether to accept transformers of any model, if their forward has an argument `hidden_states`.

    Raises:
        ValueError: the target has no transformer of a supported model.
    """
    module = module_of(target)
    if module is None:
        raise ValueError(
            f"target: {type(target).__name__} is not a transformer and has none; accepted are transformers and "
            f"pipelines of {', '.join(FAMILIES)}"
        )
    for inner in module.modules():
        if is_supported(inner):
            return inner
    if any_model:
        from diffusers import ModelMixin

        inner = next((x for x in module.modules() if isinstance(x, ModelMixin)), module)
        if "hidden_states" not in inspect.signature(type(inner).forward).parameters:
            raise ValueError(
                f"target: the forward of {type(inner).__name__} has no argument hidden_states; accepted are "
                "transformers that take their latents under this name"
            )
        return inner
    family_of(module)  # raises the error that lists the supported classes
    raise AssertionError("unreachable")
