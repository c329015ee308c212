"""Qwen-Image, accelerated."""

from diffusers import QwenImagePipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import PairedSizes, checked_call


class SparseQwenImagePipeline(SparsePipelineMixin, PairedSizes, QwenImagePipeline):
    """`diffusers.QwenImagePipeline` with sparse attention and region-adaptive sampling; every argument of the
    parent works. For image-to-image, inpainting, ControlNet, Edit and Layered, call `dit_accel.enable` on the
    pipeline of diffusers, or share the accelerated transformer with `AutoPipelineForImage2Image.from_pipe(pipe)`.

    Example:
        >>> pipe = SparseQwenImagePipeline.from_pretrained("Qwen/Qwen-Image", dtype="bf16", ras="balanced")
        >>> image = pipe("a cat on a skateboard", negative_prompt=" ", true_cfg_scale=4.0).images[0]
        >>> print(pipe.summary())
    """

    _parent = "QwenImagePipeline"
    __init__ = accelerated_init(QwenImagePipeline.__init__)
    __call__ = checked_call(QwenImagePipeline.__call__)
