"""Model families that can be fine-tuned. Each file defines a subclass of `Trainable` for one family."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.finetune.families.base import Trainable

FAMILIES = {
    "WanPipeline": "wan",
    "StableDiffusion3Pipeline": "sd3",
    "LuminaPipeline": "lumina",
    "Lumina2Pipeline": "lumina2",
}
"""Names of the families, by class name of the diffusers pipeline."""
CLASSES = {
    "WanTransformer3DModel": "wan.WanTrainable",
    "SD3Transformer2DModel": "sd3.StableDiffusion3Trainable",
    "LuminaNextDiT2DModel": "lumina.LuminaTrainable",
    "Lumina2Transformer2DModel": "lumina2.Lumina2Trainable",
}
"""Module and class name of the `Trainable` subclasses, by class name of the transformer."""


def family_name(outline: Any, model: str) -> str:
    """Return the name of the family of an outline.

    Args:
        outline: result of `dit_accel.sampling.outline.read_outline`.
        model: name of the model in messages.

    Raises:
        ValueError: if the model cannot be fine-tuned.
    """
    parent = outline.pipeline._parent
    if parent not in FAMILIES:
        raise ValueError(
            f"{model}: holds a {parent}, which cannot be fine-tuned; expected {', '.join(FAMILIES)}"
        )
    if outline.transformer_2 is not None:
        raise ValueError(
            f"{model}: has two transformers (Wan2.2) and cannot be fine-tuned; expected a model with one transformer"
        )
    if outline.expand_timesteps:
        raise ValueError(
            f"{model}: has expand_timesteps=True (Wan2.2 TI2V) and cannot be fine-tuned; expected a model with one timestep "
            "per sample"
        )
    return FAMILIES[parent]


def trainable_class(transformer: Any) -> "type[Trainable]":
    """Return the subclass of `Trainable` for a transformer.

    Raises:
        ValueError: if the model cannot be fine-tuned.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in CLASSES:
            module, name = CLASSES[cls.__name__].split(".")
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            found.check(transformer)
            return found
    raise ValueError(
        f"transformer: {type(transformer).__name__} cannot be fine-tuned; expected {', '.join(CLASSES)}"
    )


def trainable_of(pipe: Any, *, max_sequence_length: int | None = None) -> "Trainable":
    """Create the `Trainable` of a pipeline.

    Args:
        pipe: a text-to-image or text-to-video pipeline of diffusers or of this package.
        max_sequence_length: number of text tokens of a prompt. Default: the default of the pipeline call.

    Raises:
        ValueError: if the pipeline cannot be fine-tuned.
    """
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "pipe.transformer_2: a pipeline with two transformers (Wan2.2) cannot be fine-tuned; expected None"
        )
    if getattr(getattr(pipe, "config", None), "expand_timesteps", False):
        raise ValueError(
            "pipe.config.expand_timesteps=True: a model with one timestep per token (Wan2.2 TI2V) cannot be fine-tuned; "
            "expected False"
        )
    return trainable_class(pipe.transformer)(pipe, max_sequence_length=max_sequence_length)
