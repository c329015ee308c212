"""Networks that turn pictures into features, and how pictures are brought to their size."""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from dit_accel.eval.metrics.weights import module_sha256
from dit_accel.eval.results.types import Extractor as ExtractorRecord

Resize = Literal["clean", "tf-legacy", "torch-antialias"]
"""clean: Pillow's bicubic on float channels, antialiased, as clean-fid. tf-legacy: bilinear without
antialiasing from the corner, as TensorFlow 1, the first FID code and torch-fidelity. torch-antialias:
bilinear, antialiased, as torchmetrics."""
Frame = UInt8[np.ndarray, "h w 3"]


class Extractor:
    """A network, how pictures are resized for it, and what its figures are called.

    Args:
        module: float32 `[n, 3, h, w]` with values in [0, 1] -> `[n, d]`. It is put into evaluation mode
            and keeps no gradients.
        name: of the figures: the Fréchet distance is `fd_<name>`, and only the Inception of
            `inception.load_inception` gives "fid".
        id: what the module is; default: `name`.
        sha256: of its weights; default: of the module's tensors.
        size: sides that pictures are resized to; None: no resizing, and all pictures must have one
            size.
        resize: how.
        device: where it runs; "auto" is the GPU where there is one.
        kinds: names of the features where the module returns a dict of several.
        flags: go into every figure.

    Raises:
        ValueError: an unknown way of resizing, or a name that cannot be part of a figure's.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        id: str | None = None,  # noqa: A002  # as in the figures
        sha256: str | None = None,
        size: int | tuple[int, int] | None = None,
        resize: Resize = "clean",
        device: torch.device | str = "cpu",
        kinds: Sequence[str] = ("",),
        flags: Sequence[str] = (),
    ) -> None:
        check_resize(resize)
        if not name.isidentifier():
            raise ValueError(f"name={name!r}: accepted are letters, digits and underscores")
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError(f"size={size!r}: accepted are pixels >= 1")
        self.name = name
        self.size = (size, size) if isinstance(size, int) else size
        self.resize = resize
        self.device = torch.device(device)
        self.module = module.eval().requires_grad_(False).to(self.device)
        self.kinds = tuple(kinds)
        self.flags = list(flags)
        self._id = id or name
        self._sha256 = sha256 or module_sha256(module)
        self._seen: tuple[int, ...] | None = None

    def record(self, kind: str = "") -> ExtractorRecord:
        """What a figure says about its features; `kind` is the name they have in the dict."""
        return ExtractorRecord(
            id=f"{self._id}:{kind}" if kind else self._id,
            sha256=self._sha256,
            resize=self.resize if self.size else None,
        )

    def prepare(self, frame: Frame) -> Float32[Tensor, "3 s1 s2"]:
        """A picture as the network gets it.

        Raises:
            ValueError: pictures of different sizes, and the extractor does not resize.
        """
        if self.size:
            return resized(frame, self.size, self.resize) / 255
        self._seen = self._seen or frame.shape
        if frame.shape != self._seen:
            sizes = [f"{x[1]}x{x[0]}" for x in (frame.shape, self._seen)]
            raise ValueError(
                f"pictures of {sizes[0]} and of {sizes[1]}: extractor {self.name!r} does not resize, accepted "
                "is one size; or give it a size"
            )
        return torch.from_numpy(frame).permute(2, 0, 1).float() / 255

    @torch.no_grad()
    def __call__(self, images: Sequence[Float32[Tensor, "3 s1 s2"]]) -> dict[str, Tensor]:
        """Features `[n, d]` of prepared pictures, by kind.

        Raises:
            ValueError: the module returns something else.
        """
        # Channels last, as pictures are read: a third faster on a CPU.
        batch = torch.stack([x.permute(1, 2, 0) for x in images]).permute(0, 3, 1, 2)
        out = self.module(batch.to(self.device))
        found: dict[str, Any] = out if isinstance(out, dict) else {"": out}
        for kind in self.kinds:
            features = found.get(kind)
            if (
                not isinstance(features, Tensor)
                or features.ndim != 2
                or len(features) != len(batch)
            ):
                shape = tuple(getattr(features, "shape", ())) or type(features).__name__
                raise ValueError(
                    f"extractor {self.name!r} returned {shape} for {len(batch)} pictures; accepted is a tensor "
                    f"[{len(batch)}, features]"
                )
        return {kind: found[kind] for kind in self.kinds}


def tiny_extractor(
    path: str | os.PathLike | None = None, *, device: torch.device | str = "cpu"
) -> Extractor:
    """The shipped network for the demo's pictures, or the one at `path`: 64 features, "fd_tiny".

    Raises:
        ValueError: the file does not hold its weights.
    """
    from dit_accel.eval.metrics.tiny_extractor import (
        FEATURES,
        SIZE,
        TinyExtractor,
        tiny_extractor_path,
    )
    from dit_accel.eval.metrics.weights import file_sha256, read_weights

    path = path or tiny_extractor_path()
    sha256 = file_sha256(path, "path")
    module = TinyExtractor()
    try:
        module.load_state_dict({k: v.float() for k, v in read_weights(path, "path").items()})
    except RuntimeError as error:
        raise ValueError(f"path={str(path)!r}: not of the tiny extractor ({error})") from None
    return Extractor(
        module,
        name="tiny",
        id=f"dit-accel-tiny:{FEATURES}",
        sha256=sha256,
        size=SIZE,
        device=device,
    )


def check_resize(resize: str) -> None:
    """One of the three ways.

    Raises:
        ValueError: it is not.
    """
    if resize not in get_args(Resize):
        raise ValueError(f"resize={resize!r}: accepted are {', '.join(get_args(Resize))}")


def resized(
    frame: Frame, size: tuple[int, int], how: Resize = "clean"
) -> Float32[Tensor, "3 s1 s2"]:
    """A picture at another size, values in [0, 255] and not rounded."""
    image = torch.from_numpy(frame).permute(2, 0, 1).float()
    if image.shape[1:] == size:  # no way changes it then
        return image
    if how == "clean":
        from PIL import Image

        channels = [
            np.asarray(
                Image.fromarray(frame[..., c].astype(np.float32)).resize(
                    (size[1], size[0]), Image.Resampling.BICUBIC
                )
            )
            for c in range(3)
        ]
        return torch.from_numpy(np.stack(channels)).clamp(0, 255)
    if how == "torch-antialias":
        return F.interpolate(
            image[None], size, mode="bilinear", align_corners=False, antialias=True
        )[0]
    return _corner_bilinear(_corner_bilinear(image, size[1], 2), size[0], 1)


def _corner_bilinear(
    image: Float[Tensor, "3 h w"], size: int, axis: int
) -> Float[Tensor, "3 h2 w2"]:
    """Bilinear along an axis; pixel i of the result looks at place i · (old size / new size)."""
    length = image.shape[axis]
    place = torch.arange(size, dtype=torch.float32) * (length / size)
    low = place.long()
    high = (low + 1).clamp_max(length - 1)
    share = (place - low).reshape(-1, *[1] * (2 - axis))
    return torch.lerp(image.index_select(axis, low), image.index_select(axis, high), share)
