"""Wan2.1 and Wan2.2 image-to-video, accelerated; a file of its own, because importing it needs an image processor."""

from diffusers import WanImageToVideoPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import VideoSizes, checked_call


class SparseWanImageToVideoPipeline(SparsePipelineMixin, VideoSizes, WanImageToVideoPipeline):
    """`diffusers.WanImageToVideoPipeline` with sparse self-attention and region-adaptive sampling; every
    argument of the parent works."""

    _parent = "WanImageToVideoPipeline"
    __init__ = accelerated_init(WanImageToVideoPipeline.__init__)
    __call__ = checked_call(WanImageToVideoPipeline.__call__)
