"""FLUX.1, accelerated."""

from diffusers import FluxPipeline

from dit_accel.pipelines.accelerate import accelerated_init
from dit_accel.pipelines.base import SparsePipelineMixin
from dit_accel.pipelines.sizes import PairedSizes, checked_call


class SparseFluxPipeline(SparsePipelineMixin, PairedSizes, FluxPipeline):
    """`diffusers.FluxPipeline` with sparse attention and region-adaptive sampling; every argument of the parent
    works, and sizes that it would round are refused. For image-to-image, inpainting, Fill, Control, ControlNet and
    Kontext, call `dit_accel.enable` on the pipeline of diffusers, or share the accelerated transformer with `AutoPipelineForImage2Image.from_pipe(pipe)`.

    Example:
        >>> pipe = SparseFluxPipeline.from_pretrained(
        ...     "black-forest-labs/FLUX.1-dev", dtype="bf16", ras="balanced"
        ... )
        >>> image = pipe("a cat on a skateboard", num_inference_steps=28).images[0]
        >>> print(pipe.summary())
    """

    _parent = "FluxPipeline"
    __init__ = accelerated_init(FluxPipeline.__init__)
    __call__ = checked_call(FluxPipeline.__call__)
