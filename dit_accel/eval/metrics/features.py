"""Networks that turn pictures into features, and the ways to resize pictures for them."""

import io
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from dit_accel.eval.metrics.networks import import_library, load_weights, module_sha256
from dit_accel.eval.results.types import Extractor as ExtractorRecord

Resize = Literal["clean", "tf-legacy", "torch-antialias"]
"""clean: Pillow's bicubic filter on float channels, as in clean-fid. tf-legacy: bilinear, aligned to the
corner and without antialiasing, as in TensorFlow 1, the first FID code and torch-fidelity.
torch-antialias: bilinear with antialiasing, as in torchmetrics."""
Frame = UInt8[np.ndarray, "h w 3"]
TINY = "tiny"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Hash of `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) and of the identical
`pt_inception-2015-12-05-6726825d.pth` (pytorch-fid)."""


class Extractor:
    """Network for metrics that compare features, with its way of resizing and its name.

    Args:
        module: maps float32 `[n, 3, h, w]` with values in [0, 1] to `[n, d]`; put into evaluation mode.
        name: last part of the metrics' names, as in `fd_<name>`.
        id: identity of the module in results. Default: `name`.
        sha256: hash of the weights. Default: hash of the module's tensors.
        size: height and width, or side, that pictures are resized to. None: all pictures have one size.
        resize: way of resizing.
        flags: flags of every value that rests on this network.

    Raises:
        ValueError: `resize`, `name` or `size` is not valid.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        id: str | None = None,  # noqa: A002  # the name of the field in results.json
        sha256: str | None = None,
        size: int | tuple[int, int] | None = None,
        resize: Resize = "clean",
        device: torch.device | str = "cpu",
        flags: Sequence[str] = (),
    ) -> None:
        check_resize(resize)
        if not name.isidentifier():
            raise ValueError(f"name={name!r}: must be letters, digits and underscores")
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError(f"size={size!r}: must be >= 1 pixel")
        self.name = name
        self.size = (size, size) if isinstance(size, int) else size
        self.resize = resize
        self.device = torch.device(device)
        self.module = module.eval().requires_grad_(False).to(self.device)
        self.flags = list(flags)
        self.record = ExtractorRecord(
            id=id or name,
            sha256=sha256 or module_sha256(module),
            resize=resize if self.size else None,
        )
        self._shape: tuple[int, ...] | None = None

    def prepare(self, frame: Frame) -> Float32[Tensor, "3 s1 s2"]:
        """Return a picture as the network reads it."""
        if self.size:
            return resized(frame, self.size, self.resize) / 255
        self._shape = self._shape or frame.shape
        if frame.shape != self._shape:
            sizes = " and ".join(f"{x[1]}x{x[0]}" for x in (frame.shape, self._shape))
            raise ValueError(
                f"pictures of {sizes}: must have one size for extractor {self.name!r} with size=None"
            )
        return torch.from_numpy(frame).permute(2, 0, 1).float() / 255

    @torch.no_grad()
    def __call__(self, images: Sequence[Float32[Tensor, "3 s1 s2"]]) -> Float[Tensor, "n d"]:
        """Return the features of prepared pictures."""
        # Pictures are read channels last; keeping that layout saves a third of the time on a CPU.
        batch = torch.stack([x.permute(1, 2, 0) for x in images]).permute(0, 3, 1, 2)
        found = self.module(batch.to(self.device))
        shape = tuple(getattr(found, "shape", ()))
        if len(shape) != 2 or shape[0] != len(batch):
            raise ValueError(
                f"extractor {self.name!r} returned {shape or type(found).__name__} for {len(batch)} pictures: "
                f"must be a tensor [{len(batch)}, features]"
            )
        return found


def tiny_extractor(
    path: str | os.PathLike | None = None, *, device: torch.device | str = "cpu"
) -> Extractor:
    """Return the extractor "tiny" with the shipped weights, or with those at `path`."""
    from dit_accel.demo.tiny_extractor import ASSET, FEATURES, SIZE, TinyExtractor
    from dit_accel.files import asset

    path = path or asset(ASSET)
    state, sha256, _ = load_weights("path", path)
    module = TinyExtractor()
    try:
        module.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        raise ValueError(f"path={str(path)!r}: not of the tiny extractor ({error})") from None
    identity = f"dit-accel-tiny:{FEATURES}"
    return Extractor(module, name=TINY, id=identity, sha256=sha256, size=SIZE, device=device)


def check_resize(resize: str) -> None:
    """Raise ValueError unless `resize` is one of the three ways."""
    if resize not in get_args(Resize):
        raise ValueError(f"resize={resize!r}: must be one of {', '.join(get_args(Resize))}")


def resized(
    frame: Frame, size: tuple[int, int], how: Resize = "clean"
) -> Float32[Tensor, "3 s1 s2"]:
    """Return a picture at another size, with values in [0, 255] that are not rounded."""
    image = torch.from_numpy(frame).permute(2, 0, 1).float()
    if image.shape[1:] == size:
        return image
    if how == "clean":
        from PIL import Image

        channels = [Image.fromarray(frame[..., c].astype(np.float32)) for c in range(3)]
        found = [np.asarray(x.resize(size[::-1], Image.Resampling.BICUBIC)) for x in channels]
        return torch.from_numpy(np.stack(found)).clamp(0, 255)
    if how == "torch-antialias":
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    library = import_library("torch_fidelity.interpolate_compat_tensorflow", "torch-fidelity")
    bilinear = library.interpolate_bilinear_2d_like_tensorflow1x
    return bilinear(image[None], size, align_corners=False)[0]


class InceptionFeatures(nn.Sequential):
    """FID's Inception network up to its last pooling, for pictures with values in [0, 1].

    torch-fidelity's own forward pass reads bytes only and resizes in one way only.
    """

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 2048"]:
        return super().forward((images * 255 - 128) / 128).flatten(1)


def load_inception(
    weights: str | os.PathLike, *, allow_other_weights: bool = False, **options: Any
) -> Extractor:
    """Return the extractor "inception".

    Args:
        weights: file with the hash `INCEPTION_SHA256`; with `allow_other_weights` also a .pth or safetensors file
            of the same tensors, for values with the flag "other-weights".
        options: `resize` and `device` of the extractor.
    """
    what = "FID's Inception weights"
    state, sha256, flags = load_weights(
        "inception", weights, INCEPTION_SHA256, what, allow_other_weights
    )
    library = import_library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    # The class loads its weights with torch.load, which would run code in the file: pass it safe bytes.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    network = library.FeatureExtractorInceptionV3
    try:
        layers = network("inception", ["2048"], feature_extractor_weights_path=buffer).children()
    except RuntimeError as error:
        first, named = str(error).splitlines()[0], f"inception={str(weights)!r}"
        raise ValueError(f"{named}: does not hold Inception's weights ({first})") from None
    module = InceptionFeatures(*list(layers)[:-1])  # without the classifier
    options |= {"id": "inception-v3-2015-12-05:2048", "sha256": sha256, "size": 299, "flags": flags}
    return Extractor(module, name="inception", **options)
