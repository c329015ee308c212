"""Networks that turn pictures into features, and the ways to resize pictures for them."""

import io
import os
from collections.abc import Sequence
from itertools import pairwise
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
TINY_ASSET = "tiny-extractor.safetensors"
TINY_SIZE = 64
"""Side of the pictures that the tiny extractor reads, in pixels."""
TINY_FEATURES = 64
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Hash of `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) and of the identical
`pt_inception-2015-12-05-6726825d.pth` (pytorch-fid)."""
_INCEPTION_SIZE = 299
_ENDS = {"MaxPool_1": "64", "MaxPool_2": "192", "Mixed_6e": "768", "Mixed_7c": "2048"}
"""Kind of features after a layer: the two max-pools, before the auxiliary classifier, and the end."""
_SPATIAL_LAYER, _SPATIAL_CHANNELS = "Mixed_6d", 7
"""Layer `mixed_6/conv` of TensorFlow: ADM's sFID takes its first 7 channels at every position."""


class Extractor:
    """Network for metrics that compare features, with its way of resizing and its name.

    Args:
        module: maps float32 `[n, 3, h, w]` with values in [0, 1] to `[n, d]`. It is put into evaluation mode
            without gradients.
        name: last part of the metrics' names. The Fréchet distance is `fd_<name>`; only the network of
            `inception.load_inception` gives "fid".
        id: identity of the module in results. Default: `name`.
        sha256: hash of the weights. Default: hash of the module's tensors.
        size: height and width, or side, that pictures are resized to. None: pictures are not resized and
            must have one size.
        resize: way of resizing.
        device: device of the module.
        kinds: names of the features, for a module that returns a dict of several.
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
        self._shape: tuple[int, ...] | None = None

    def record(self, kind: str = "") -> ExtractorRecord:
        """Return the identity of the features of one kind, as results name it."""
        return ExtractorRecord(
            id=f"{self._id}:{kind}" if kind else self._id,
            sha256=self._sha256,
            resize=self.resize if self.size else None,
        )

    def source(self, kind: str) -> str:
        """Return the name of the features of one kind in a measurement."""
        return f"{self.name}:{kind}" if kind else self.name

    def prepare(self, frame: Frame) -> Float32[Tensor, "3 s1 s2"]:
        """Return a picture as the network reads it.

        Raises:
            ValueError: pictures differ in size and the extractor does not resize.
        """
        if self.size:
            return resized(frame, self.size, self.resize) / 255
        self._shape = self._shape or frame.shape
        if frame.shape != self._shape:
            sizes = [f"{x[1]}x{x[0]}" for x in (frame.shape, self._shape)]
            raise ValueError(
                f"pictures of {sizes[0]} and of {sizes[1]}: accepted is one size for extractor {self.name!r} "
                "with size=None"
            )
        return torch.from_numpy(frame).permute(2, 0, 1).float() / 255

    @torch.no_grad()
    def __call__(self, images: Sequence[Float32[Tensor, "3 s1 s2"]]) -> dict[str, Tensor]:
        """Return the features `[n, d]` of prepared pictures by kind.

        Raises:
            ValueError: the module returns something else.
        """
        # Pictures are read channels last; keeping that layout saves a third of the time on a CPU.
        batch = torch.stack([x.permute(1, 2, 0) for x in images]).permute(0, 3, 1, 2)
        out = self.module(batch.to(self.device))
        found: dict[str, Any] = out if isinstance(out, dict) else {"": out}
        for kind in self.kinds:
            shape = tuple(getattr(found.get(kind), "shape", ()))
            if len(shape) != 2 or shape[0] != len(batch):
                raise ValueError(
                    f"extractor {self.name!r} returned {shape or type(out).__name__} for {len(batch)} "
                    f"pictures; accepted is a tensor [{len(batch)}, features]"
                )
        return {kind: found[kind] for kind in self.kinds}


class TinyExtractor(nn.Module):
    """Network for the demo's pictures: values in [0, 1] to 64 features, about 115,000 parameters.

    `eval/train_extractor.py` trains it from scratch on the demo's drawings to name shape, colours, place and
    size, and to measure blur and noise. The judge's CNN cannot replace it: that network reads one normalised
    mask of the object, so colour, background, place and texture do not change its features.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 16, 32, 48, 64)
        for i, (before, after) in enumerate(pairwise(channels)):
            width = 3 if i else 5
            layers += [nn.Conv2d(before, after, width, stride=2, padding=width // 2), nn.GELU()]
        last = nn.Linear(channels[-1] * (TINY_SIZE // 16) ** 2, TINY_FEATURES)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        return self.layers(2 * images - 1)


def tiny_extractor(
    path: str | os.PathLike | None = None, *, device: torch.device | str = "cpu"
) -> Extractor:
    """Return the extractor "tiny" with the shipped weights, or with those at `path`.

    Raises:
        ValueError: the file does not hold its weights.
    """
    from dit_accel.files import asset

    path = path or asset(TINY_ASSET)
    state, sha256, _ = load_weights("path", path)
    module = TinyExtractor()
    try:
        module.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        raise ValueError(f"path={str(path)!r}: not of the tiny extractor ({error})") from None
    identity = f"dit-accel-tiny:{TINY_FEATURES}"
    return Extractor(module, name=TINY, id=identity, sha256=sha256, size=TINY_SIZE, device=device)


def check_resize(resize: str) -> None:
    """Raise ValueError unless `resize` is one of the three ways."""
    if resize not in get_args(Resize):
        raise ValueError(f"resize={resize!r}: accepted are {', '.join(get_args(Resize))}")


def resized(
    frame: Frame, size: tuple[int, int], how: Resize = "clean"
) -> Float32[Tensor, "3 s1 s2"]:
    """Return a picture at another size, with values in [0, 255] that are not rounded."""
    image = torch.from_numpy(frame).permute(2, 0, 1).float()
    if image.shape[1:] == size:
        return image
    if how == "clean":
        from PIL import Image

        channels = [
            Image.fromarray(frame[..., c].astype(np.float32)).resize(
                size[::-1], Image.Resampling.BICUBIC
            )
            for c in range(3)
        ]
        return torch.from_numpy(np.stack([np.asarray(x) for x in channels])).clamp(0, 255)
    if how == "torch-antialias":
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    library = import_library("torch_fidelity.interpolate_compat_tensorflow", "torch-fidelity")
    return library.interpolate_bilinear_2d_like_tensorflow1x(image[None], size)[0]


class InceptionFeatures(nn.Module):
    """Several kinds of features from one forward pass, which ends at the last layer that they need.

    torch-fidelity's own forward pass reads bytes only, resizes in one way only and has no spatial features.

    Args:
        network: torch-fidelity's `FeatureExtractorInceptionV3`.
        kinds: "64", "192", "768", "2048" or "spatial".
    """

    def __init__(self, network: nn.Module, kinds: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.kinds = tuple(kinds)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> dict[str, Tensor]:
        """Return the features of pictures with values in [0, 1] by kind."""
        x = (images * 255 - 128) / 128
        out: dict[str, Tensor] = {}
        for name, layer in self.network.named_children():  # in the order of the forward pass
            if name == _SPATIAL_LAYER and "spatial" in self.kinds:
                branch = layer.get_submodule("branch1x1")(x)
                out["spatial"] = branch[:, :_SPATIAL_CHANNELS].flatten(1)
            if len(out) == len(self.kinds):
                break
            x = layer(x)
            if _ENDS.get(name) in self.kinds:
                out[_ENDS[name]] = x.mean((2, 3))
        return out


def load_inception(
    weights: str | os.PathLike,
    *,
    kinds: Sequence[str] = ("2048",),
    resize: Resize = "clean",
    allow_other_weights: bool = False,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Return the extractor "inception".

    Args:
        weights: file with the hash `INCEPTION_SHA256`, or with `allow_other_weights` a .pth or safetensors file of the
            same tensors; values then carry the flag "other-weights".
        kinds: features to compute, see `InceptionFeatures`.

    Raises:
        ValueError: the file does not hold the weights.
        ImportError: torch-fidelity cannot be imported.
    """
    state, sha256, flags = load_weights(
        "inception",
        weights,
        known=INCEPTION_SHA256,
        what="FID's Inception weights",
        allow_other_weights=allow_other_weights,
    )
    library = import_library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    # The class loads its weights with torch.load, which would run code in the file: pass it safe bytes.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        network = library.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer
        )
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"inception={str(weights)!r}: does not hold Inception's weights ({first})"
        ) from None
    return Extractor(
        InceptionFeatures(network, kinds),
        name="inception",
        id="inception-v3-2015-12-05",
        sha256=sha256,
        size=_INCEPTION_SIZE,
        resize=resize,
        device=device,
        kinds=kinds,
        flags=flags,
    )
