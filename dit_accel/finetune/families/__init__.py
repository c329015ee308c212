"""`Trainable`: what fine-tuning asks of a model family; one subclass per file."""

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
"""Names of families by the class name of the diffusers pipeline."""
CLASSES = {
    "WanTransformer3DModel": "wan.WanTrainable",
    "SD3Transformer2DModel": "sd3.StableDiffusion3Trainable",
    "LuminaNextDiT2DModel": "lumina.LuminaTrainable",
    "Lumina2Transformer2DModel": "lumina2.Lumina2Trainable",
}
"""Subclasses of `Trainable` by the class name of the transformer."""


def family_name(outline: Any, model: str) -> str:
    """Return the name of the family of an outline.

    Args:
        outline: result of `dit_accel.sampling.outline.read_outline`.
        model: how messages call the model.

    Raises:
        ValueError: its models cannot be fine-tuned.
    """
    parent = outline.pipeline._parent
    if parent not in FAMILIES:
        raise ValueError(
            f"{model}: holds a {parent}, which cannot be fine-tuned; accepted are {', '.join(FAMILIES)}"
        )
    if outline.transformer_2 is not None:
        raise ValueError(
            f"{model}: has two transformers (Wan2.2), and cannot be fine-tuned; accepted are models with one"
        )
    if outline.expand_timesteps:
        raise ValueError(
            f"{model}: has one timestep for each token (Wan2.2 TI2V), and cannot be fine-tuned; accepted are models with "
            "one for each sample"
        )
    return FAMILIES[parent]


def trainable_class(transformer: Any) -> "type[Trainable]":
    """Return the subclass of `Trainable` for a transformer.

    Raises:
        ValueError: its models cannot be fine-tuned.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in CLASSES:
            module, name = CLASSES[cls.__name__].split(".")
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            found.check(transformer)
            return found
    raise ValueError(
        f"transformer: {type(transformer).__name__} cannot be fine-tuned; accepted are {', '.join(CLASSES)}"
    )


def trainable_of(pipe: Any, *, max_sequence_length: int | None = None) -> "Trainable":
    """Return what fine-tuning needs of a pipeline.

    Args:
        pipe: a text-to-image or text-to-video pipeline of diffusers or of this package.
        max_sequence_length: text tokens of a prompt. Default: that of the pipeline's call.

    Raises:
        ValueError: a pipeline that cannot be fine-tuned.
    """
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "pipe.transformer_2: a pipeline with two transformers (Wan2.2) cannot be fine-tuned; accepted: None"
        )
    if getattr(getattr(pipe, "config", None), "expand_timesteps", False):
        raise ValueError(
            "pipe.config.expand_timesteps=True: a model with one timestep for each token (Wan2.2 TI2V) cannot be "
            "fine-tuned; accepted: False"
        )
    return trainable_class(pipe.transformer)(pipe, max_sequence_length=max_sequence_length)
