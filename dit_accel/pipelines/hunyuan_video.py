"""HunyuanVideo text-to-video, accelerated."""

from diffusers import HunyuanVideoPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import HunyuanVideoSizes, checked_call


class SparseHunyuanVideoPipeline(SparsePipelineMixin, HunyuanVideoSizes, HunyuanVideoPipeline):
    """`diffusers.HunyuanVideoPipeline` with sparse attention and region-adaptive sampling; every argument of the
    parent works. For image-to-video, call `dit_accel.enable` on the pipeline of diffusers.

    Example:
        >>> pipe = SparseHunyuanVideoPipeline.from_pretrained(
        ...     "hunyuanvideo-community/HunyuanVideo", dtype="bf16", sla="balanced"
        ... )
        >>> frames = pipe("a cat on a skateboard", height=544, width=960, num_frames=61).frames[0]
        >>> print(pipe.summary())
    """

    _parent = "HunyuanVideoPipeline"
    __init__ = accelerated_init(HunyuanVideoPipeline.__init__)
    __call__ = checked_call(HunyuanVideoPipeline.__call__)
