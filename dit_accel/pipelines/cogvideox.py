"""CogVideoX text-to-video, accelerated."""

from diffusers import CogVideoXPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import CogVideoXSizes, checked_call


class SparseCogVideoXPipeline(SparsePipelineMixin, CogVideoXSizes, CogVideoXPipeline):
    """`diffusers.CogVideoXPipeline` with sparse attention and region-adaptive sampling; every argument of the parent
    works. For image-to-video, call `dit_accel.enable` on the pipeline of diffusers.

    Example:
        >>> pipe = SparseCogVideoXPipeline.from_pretrained("zai-org/CogVideoX-5b", dtype="bf16", sla="balanced")
        >>> frames = pipe("a cat on a skateboard", height=480, width=720, num_frames=49).frames[0]
        >>> print(pipe.summary())
    """

    _parent = "CogVideoXPipeline"
    __init__ = accelerated_init(CogVideoXPipeline.__init__)
    __call__ = checked_call(CogVideoXPipeline.__call__)
