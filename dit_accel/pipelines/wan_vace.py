"""Wan2.1 VACE, video from text, video, masks and pictures, accelerated."""

from diffusers import WanVACEPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import VideoSizes, checked_call


class SparseWanVACEPipeline(SparsePipelineMixin, VideoSizes, WanVACEPipeline):
    """`diffusers.WanVACEPipeline` with sparse self-attention and region-adaptive sampling; every argument of
    the parent works."""

    _parent = "WanVACEPipeline"
    __init__ = accelerated_init(WanVACEPipeline.__init__)
    __call__ = checked_call(WanVACEPipeline.__call__)
