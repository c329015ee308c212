"""Checks of heights, widths and frame counts: sizes that diffusers would round are refused."""

import functools
import inspect
from typing import Any


def _check_multiple(name: str, value: Any, step: int) -> None:
    if not isinstance(value, int) or value < step or value % step:
        low = value // step * step if isinstance(value, int) else 0
        raise ValueError(
            f"{name}={value!r}: accepted are multiples of {step}, such as {max(low, step)} or {low + step}"
        )


def _check_clip(
    height: Any, width: Any, num_frames: Any, *, steps: tuple[int, int], temporal: int
) -> None:
    """Check the size of a clip. `steps` are the steps of height and width, `temporal` that of the frames."""
    for name, value, step in zip(("height", "width"), (height, width), steps, strict=True):
        _check_multiple(name, value, step)
    if not isinstance(num_frames, int) or num_frames < 1 or (num_frames - 1) % temporal:
        low = (num_frames - 1) // temporal * temporal + 1 if isinstance(num_frames, int) else 1
        raise ValueError(
            f"num_frames={num_frames!r}: accepted is {temporal}k+1, such as {max(low, 1)} or {max(low, 1) + temporal}"
        )


class VideoSizes:
    """Size checks of Wan pipelines."""

    def check_sizes(
        self, *, height: int = 480, width: int = 832, num_frames: int = 81, **_: Any
    ) -> None:
        """Check a size before the call; defaults as in `__call__`.

        Raises:
            ValueError: the model does not support the size.
        """
        # A Wan2.2 pipeline may have only its second transformer.
        transformer = self.transformer or self.transformer_2  # type: ignore[attr-defined]
        patch = transformer.config.patch_size
        spatial = self.vae_scale_factor_spatial  # type: ignore[attr-defined]
        steps = max(16, spatial * patch[1]), max(16, spatial * patch[2])  # diffusers requires 16
        temporal = self.vae_scale_factor_temporal  # type: ignore[attr-defined]
        _check_clip(height, width, num_frames, steps=steps, temporal=temporal)


class LTXSizes:
    """Size checks of LTX-Video pipelines."""

    def check_sizes(
        self, *, height: int = 512, width: int = 704, num_frames: int = 161, **_: Any
    ) -> None:
        """Check a size before the call; defaults as in `__call__`.

        Raises:
            ValueError: the model does not support the size.
        """
        spatial = self.vae_spatial_compression_ratio  # type: ignore[attr-defined]
        step = max(32, spatial)  # diffusers requires 32
        temporal = self.vae_temporal_compression_ratio  # type: ignore[attr-defined]
        _check_clip(height, width, num_frames, steps=(step, step), temporal=temporal)


class HunyuanVideoSizes:
    """Size checks of HunyuanVideo pipelines."""

    def check_sizes(
        self, *, height: int = 720, width: int = 1280, num_frames: int = 129, **_: Any
    ) -> None:
        """Check a size before the call; defaults as in `__call__`.

        Raises:
            ValueError: the model does not support the size.
        """
        patch = self.transformer.config.patch_size  # type: ignore[attr-defined]
        spatial = self.vae_scale_factor_spatial  # type: ignore[attr-defined]
        step = max(16, spatial * patch)  # diffusers requires 16
        temporal = self.vae_scale_factor_temporal  # type: ignore[attr-defined]
        _check_clip(height, width, num_frames, steps=(step, step), temporal=temporal)


class CogVideoXSizes:
    """Size checks of CogVideoX pipelines."""

    def check_sizes(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **_: Any,
    ) -> None:
        """Check a size before the call; None stands for the pipeline's default.

        Raises:
            ValueError: the model does not support the size.
        """
        step = self.vae_scale_factor_spatial * self.transformer.config.patch_size  # type: ignore[attr-defined]
        for name, value in (("height", height), ("width", width)):
            if value is not None:
                _check_multiple(name, value, step)
        # The VAE decodes latent frames in pairs, and the first one alone if their number is odd.
        pair = 2 * self.vae_scale_factor_temporal  # type: ignore[attr-defined]
        whole = isinstance(num_frames, int) and num_frames >= 1
        if num_frames is None or (whole and num_frames % pair in (0, 1)):
            return
        low = num_frames // pair * pair if whole else 0
        raise ValueError(
            f"num_frames={num_frames!r}: accepted are {pair}k and {pair}k+1, such as {max(low + 1, 1)} or {low + pair}"
        )


def _check_image(
    pipe: Any, patch: int, height: int | None, width: int | None, num_frames: int | None
) -> None:
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            _check_multiple(name, value, pipe.vae_scale_factor * patch)
    if num_frames is not None:
        raise ValueError(
            f"num_frames={num_frames!r}: this model generates images; accepted is None"
        )


class ImageSizes:
    """Size checks of image pipelines."""

    def check_sizes(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **_: Any,
    ) -> None:
        """Check a size before the call; None stands for the pipeline's default.

        Raises:
            ValueError: the model does not support the size.
        """
        patch = self.transformer.config.patch_size  # type: ignore[attr-defined]
        _check_image(self, patch, height, width, num_frames)


class PairedSizes:
    """Size checks of image pipelines whose height and width are multiples of at least two latent positions.

    These are Lumina-Next, Lumina-Image 2.0, FLUX.1 and Qwen-Image.
    """

    def check_sizes(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **_: Any,
    ) -> None:
        """Check a size before the call; None stands for the pipeline's default.

        Raises:
            ValueError: the model does not support the size.
        """
        patch = max(2, self.transformer.config.patch_size)  # type: ignore[attr-defined]
        _check_image(self, patch, height, width, num_frames)


def checked_call(call: Any) -> Any:
    """Return the parent's `__call__` with the same signature and a size check."""
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
