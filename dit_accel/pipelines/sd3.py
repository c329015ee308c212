"""Stable Diffusion 3 and 3.5, accelerated."""

from diffusers import StableDiffusion3Pipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import ImageSizes, checked_call


class SparseStableDiffusion3Pipeline(SparsePipelineMixin, ImageSizes, StableDiffusion3Pipeline):
    """`diffusers.StableDiffusion3Pipeline` with sparse attention and region-adaptive sampling; every
    argument of the parent works. `AutoPipelineForImage2Image.from_pipe(pipe)` and
    `AutoPipelineForInpainting.from_pipe(pipe)` share the accelerated transformer.

    Example:
        >>> pipe = SparseStableDiffusion3Pipeline.from_pretrained(
        ...     "stabilityai/stable-diffusion-3-medium-diffusers", ras="balanced"
        ... )
        >>> image = pipe("a cat on a skateboard", num_inference_steps=28).images[0]
        >>> print(pipe.summary())
    """

    _parent = "StableDiffusion3Pipeline"
    __init__ = accelerated_init(StableDiffusion3Pipeline.__init__)
    __call__ = checked_call(StableDiffusion3Pipeline.__call__)
