"""LTX-Video text-to-video, accelerated."""

from diffusers import LTXPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import LTXSizes, checked_call


class SparseLTXPipeline(SparsePipelineMixin, LTXSizes, LTXPipeline):
    """`diffusers.LTXPipeline` with sparse self-attention and region-adaptive sampling; every argument of the parent
    works. For image-to-video and conditions, call `dit_accel.enable` on the pipeline of diffusers.

    Example:
        >>> pipe = SparseLTXPipeline.from_pretrained("Lightricks/LTX-Video", dtype="bf16", sla="balanced")
        >>> frames = pipe("a cat on a skateboard", height=512, width=704, num_frames=161).frames[0]
        >>> print(pipe.summary())
    """

    _parent = "LTXPipeline"
    __init__ = accelerated_init(LTXPipeline.__init__)
    __call__ = checked_call(LTXPipeline.__call__)
