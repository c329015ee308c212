"""Wan2.1 and Wan2.2 text-to-video, accelerated."""

from diffusers import WanPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import VideoSizes, checked_call


class SparseWanPipeline(SparsePipelineMixin, VideoSizes, WanPipeline):
    """`diffusers.WanPipeline` with sparse self-attention and region-adaptive sampling; every argument of
    the parent works. Wan2.2 14B has two transformers; settings may be a dict by their names.

    Example:
        >>> pipe = SparseWanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", sla="balanced")
        >>> frames = pipe("a cat on a skateboard", height=480, width=832, num_frames=81).frames[0]
        >>> print(pipe.summary())
    """

    _parent = "WanPipeline"
    __init__ = accelerated_init(WanPipeline.__init__)
    __call__ = checked_call(WanPipeline.__call__)
