"""Lumina-Next, accelerated."""

from diffusers import LuminaPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import PairedSizes, checked_call


class SparseLuminaPipeline(SparsePipelineMixin, PairedSizes, LuminaPipeline):
    """`diffusers.LuminaPipeline` with sparse attention and region-adaptive sampling; every argument of the
    parent works.

    Example:
        >>> pipe = SparseLuminaPipeline.from_pretrained(
        ...     "Alpha-VLLM/Lumina-Next-SFT-diffusers", ras="balanced"
        ... )
        >>> image = pipe("a cat on a skateboard", num_inference_steps=30).images[0]
    """

    _parent = "LuminaPipeline"
    _aliases = ("LuminaText2ImgPipeline",)
    __init__ = accelerated_init(LuminaPipeline.__init__)
    __call__ = checked_call(LuminaPipeline.__call__)
