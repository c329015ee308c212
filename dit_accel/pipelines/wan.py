"""Wan2.1 text-to-video with sparse attention."""

import functools
import inspect
from typing import Any

from diffusers import WanPipeline

from dit_accel.pipelines.base import SparsePipelineMixin


class WanSizes:
    _sla = "balanced"

    """Refuses sizes that diffusers would silently round."""

    def check_sizes(
        self, *, height: int = 480, width: int = 832, num_frames: int = 81, **_: Any
    ) -> None:
        """Raise ValueError for a size that this model cannot make (defaults as in `__call__`)."""
        patch = self.transformer.config.patch_size  # type: ignore[attr-defined]
        spatial = self.vae_scale_factor_spatial  # type: ignore[attr-defined]
        temporal = self.vae_scale_factor_temporal  # type: ignore[attr-defined]
        for name, value, p in (("height", height, patch[1]), ("width", width, patch[2])):
            step = max(16, spatial * p)  # diffusers itself insists on 16
            if not isinstance(value, int) or value < step or value % step:
                low = value // step * step if isinstance(value, int) else 0
                raise ValueError(
                    f"{name}={value!r}: accepted are multiples of {step}, such as {max(low, step)} or {low + step}"
                )
        if not isinstance(num_frames, int) or num_frames < 1 or (num_frames - 1) % temporal:
            low = (num_frames - 1) // temporal * temporal + 1 if isinstance(num_frames, int) else 1
            raise ValueError(
                f"num_frames={num_frames!r}: accepted is {temporal}k+1, such as {max(low, 1)} or {max(low, 1) + temporal}"
            )


def checked_call(call: Any) -> Any:
    """The parent's `__call__`, same signature, with sizes checked first."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_sizes(
            **{
                k: x
                for k, x in signature.bind(self, *args, **kwargs).arguments.items()
                if k != "self"
            }
        )
        return call(self, *args, **kwargs)

    return checked


class SparseWanPipeline(SparsePipelineMixin, WanSizes, WanPipeline):
    """`diffusers.WanPipeline` with sparse self-attention; every argument of the parent works.

    Example:
        >>> pipe = SparseWanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", sla="balanced")
        >>> frames = pipe("a cat on a skateboard", height=480, width=832, num_frames=81).frames[0]
        >>> print(pipe.summary())
    """

    _parent = "WanPipeline"
    _sla = "balanced"
    __call__ = checked_call(WanPipeline.__call__)
