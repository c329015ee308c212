"""Model families: one file each, with the facts and the attention processors of the family."""

import importlib
from typing import Any

from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer, Family, by_name
from dit_accel.models.hooks import Hook
from dit_accel.models.selection import AllTokens, TokenSelection
from dit_accel.models.tokens import TokenOrder, joint_index
from dit_accel.models.whole import WholeTransformer

FAMILIES = {
    "WanTransformer3DModel": "wan.Wan",
    "WanVACETransformer3DModel": "wan_vace.WanVACE",
    "SD3Transformer2DModel": "sd3.StableDiffusion3",
    "LuminaNextDiT2DModel": "lumina.LuminaNext",
    "Lumina2Transformer2DModel": "lumina2.Lumina2",
    "HunyuanVideoTransformer3DModel": "hunyuan_video.HunyuanVideo",
    "LTXVideoTransformer3DModel": "ltx.LTXVideo",
    "CogVideoXTransformer3DModel": "cogvideox.CogVideoX",
    "FluxTransformer2DModel": "flux.Flux",
    "QwenImageTransformer2DModel": "qwenimage.QwenImage",
}

__all__ = [
    "FAMILIES",
    "AllTokens",
    "AttentionLayer",
    "Call",
    "Family",
    "Hook",
    "TokenOrder",
    "TokenSelection",
    "WholeTransformer",
    "by_name",
    "family_of",
    "is_supported",
    "joint_index",
]


def is_supported(transformer: Any) -> bool:
    """Return whether the class of this transformer, or a parent of it, has a family."""
    return any(cls.__name__ in FAMILIES for cls in type(transformer).__mro__)


def family_of(transformer: Any) -> Family:
    """Return the family of a transformer.

    Raises:
        ValueError: the class of the transformer has no family.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in FAMILIES:
            module, name = FAMILIES[cls.__name__].split(".")
            return getattr(importlib.import_module(f"dit_accel.models.{module}"), name)()
    raise ValueError(
        f"pipe.transformer: {type(transformer).__name__}; accepted are {', '.join(FAMILIES)}"
    )
