"""One file per model family: its facts and its attention processors."""

import importlib
from typing import Any

from dit_accel.models.family import AttentionLayer, Call, Family, Focus, Hook, by_name
from dit_accel.models.tokens import TokenOrder, joint_index
from dit_accel.models.whole import WholeTransformer

FAMILIES = {
    "WanTransformer3DModel": "wan.Wan",
    "SD3Transformer2DModel": "sd3.StableDiffusion3",
    "LuminaNextDiT2DModel": "lumina.LuminaNext",
    "Lumina2Transformer2DModel": "lumina2.Lumina2",
}

__all__ = [
    "FAMILIES",
    "AttentionLayer",
    "Call",
    "Family",
    "Focus",
    "Hook",
    "TokenOrder",
    "WholeTransformer",
    "by_name",
    "check_pipeline",
    "family_of",
    "joint_index",
]


def check_pipeline(pipe: Any) -> None:
    """Refuse pipelines whose way of calling a transformer no family knows.

    Raises:
        ValueError: two transformers, or one timestep for each token (both Wan2.2).
    """
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "pipe.transformer_2: two-transformer pipelines (Wan2.2) are not supported; accepted: None"
        )
    if getattr(getattr(pipe, "config", None), "expand_timesteps", False):
        raise ValueError(
            "pipe.config.expand_timesteps=True: one timestep for each token (Wan2.2 TI2V) is not supported; accepted: "
            "False"
        )


def family_of(transformer: Any) -> Family:
    """What is known about this transformer.

    Raises:
        ValueError: no family for its class.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in FAMILIES:
            module, name = FAMILIES[cls.__name__].split(".")
            return getattr(importlib.import_module(f"dit_accel.models.{module}"), name)()
    raise ValueError(
        f"pipe.transformer: {type(transformer).__name__}; accepted are {', '.join(FAMILIES)}"
    )
