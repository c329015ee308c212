"""Wan2.1 image-to-video with sparse attention (apart: importing it needs an image processor)."""

from diffusers import WanImageToVideoPipeline

from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.wan import WanSizes, checked_call


class SparseWanImageToVideoPipeline(SparsePipelineMixin, WanSizes, WanImageToVideoPipeline):
    """`diffusers.WanImageToVideoPipeline` with sparse self-attention; every argument of the parent works."""

    _parent = "WanImageToVideoPipeline"
    _sla = "balanced"
    __call__ = checked_call(WanImageToVideoPipeline.__call__)
