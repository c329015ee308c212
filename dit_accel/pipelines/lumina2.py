"""Lumina-Image 2.0, accelerated."""

from diffusers import Lumina2Pipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import PairedSizes, checked_call


class SparseLumina2Pipeline(SparsePipelineMixin, PairedSizes, Lumina2Pipeline):
    """`diffusers.Lumina2Pipeline` with sparse attention and region-adaptive sampling; every argument of the
    parent works.

    Example:
        >>> pipe = SparseLumina2Pipeline.from_pretrained(
        ...     "Alpha-VLLM/Lumina-Image-2.0", ras="balanced"
        ... )
        >>> image = pipe("a cat on a skateboard", num_inference_steps=50).images[0]
    """

    _parent = "Lumina2Pipeline"
    _aliases = ("Lumina2Text2ImgPipeline",)
    __init__ = accelerated_init(Lumina2Pipeline.__init__)
    __call__ = checked_call(Lumina2Pipeline.__call__)
