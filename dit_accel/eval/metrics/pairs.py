"""Metrics of raw frames: PSNR, SSIM and LPIPS of two clips of the same prompt and seed, and flicker."""

import math
import os
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dit_accel.eval.metrics.networks import import_library, load_weights
from dit_accel.eval.results.types import Extractor

Frames = UInt8[np.ndarray, "t h w 3"] | Float[np.ndarray, "t h w 3"]
"""Bytes, or values in [0, 1]."""
LPIPS_BACKBONES = {"alex": "7be5be79", "vgg": "397923af", "squeeze": "b8a52dc0"}
"""Start of the sha256 of torchvision's ImageNet weights, which is part of the file's name."""


def psnr(a: Frames, b: Frames) -> float:
    """Return the peak signal-to-noise ratio over all pixels and frames in dB; inf for equal clips."""
    check_sizes(a, b)
    # Frame by frame, because a long clip in double precision is large.
    errors = [(_tensor(x) - _tensor(y)).square().mean().item() for x, y in zip(a, b, strict=True)]
    error = float(np.mean(errors))
    return -10 * math.log10(error) if error else math.inf


def ssim(a: Frames, b: Frames) -> float:
    """Return the structural similarity, averaged over pixels, channels and frames.

    The defaults of torchmetrics: 11 x 11 Gaussian window of standard deviation 1.5, borders reflected,
    K1 = .01, K2 = .03.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    check_sizes(a, b)
    if min(a.shape[1:3]) < 6:  # torchmetrics reflects 5 pixels at each border
        raise ValueError(
            f"frames of {a.shape[2]}x{a.shape[1]}: must have at least 6x6 pixels for SSIM"
        )
    frames = [(_tensor(x)[None], _tensor(y)[None]) for x, y in zip(a, b, strict=True)]
    values: list[Any] = [structural_similarity_index_measure(*x, data_range=1.0) for x in frames]
    return float(np.mean([x.item() for x in values]))


def flicker(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Return (255 - the mean absolute difference of neighbouring frames) / 255, as VBench; 1 for a still clip."""
    # int16, because differences of bytes wrap around; pair by pair, because a clip can be long.
    steps = [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(frames)]
    return float((255 - np.mean(steps)) / 255)


class Lpips:
    """Learned perceptual image patch similarity, averaged over frames.

    Args:
        weights: torchvision's ImageNet weights of the backbone (`alexnet-owt-7be5be79.pth`,
            `vgg16-397923af.pth`, `squeezenet1_1-b8a52dc0.pth`), or the same tensors as safetensors. The
            linear layers are part of the lpips package.
        net: "alex", "vgg" or "squeeze".
        allow_other_weights: accept a file with another sha256.
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        *,
        net: str = "alex",
        allow_other_weights: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if net not in LPIPS_BACKBONES:
            raise ValueError(f"net={net!r}: must be one of {', '.join(LPIPS_BACKBONES)}")
        known, what = LPIPS_BACKBONES[net], f"torchvision's {net}"
        state, sha256, self.flags = load_weights("lpips", weights, known, what, allow_other_weights)
        # Not torchmetrics, whose module downloads the backbone's weights.
        lpips = import_library("lpips", "lpips")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it calls torchvision in an old way
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # Each slice of the backbone keeps torchvision's layer numbers.
        wanted = {k: f"features.{k.split('.', 1)[1]}" for k in model.net.state_dict()}
        try:
            model.net.load_state_dict({k: state[name] for k, name in wanted.items()})
        except (KeyError, RuntimeError) as error:
            named = f"lpips={str(weights)!r}"
            raise ValueError(f"{named}: does not hold the weights of {net} ({error})") from None
        self.device = torch.device(device)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.record = Extractor(id=f"lpips-{net}-v0.1", sha256=sha256, resize=None)

    @torch.no_grad()
    def __call__(self, a: Frames, b: Frames) -> float:
        """Return the mean over frames; 0 for equal clips."""
        check_sizes(a, b)
        try:
            pairs = [[_tensor(z)[None].float() for z in pair] for pair in zip(a, b, strict=True)]
            values = [self.model(*(z.to(self.device) for z in x), normalize=True) for x in pairs]
        except RuntimeError as error:
            raise ValueError(
                f"frames of {a.shape[2]}x{a.shape[1]}: LPIPS cannot compare them ({error})"
            ) from None
        return float(np.mean([x.item() for x in values]))


def check_sizes(a: np.ndarray, b: np.ndarray) -> None:
    """Raise ValueError unless two clips have one shape and number type."""
    if a.shape != b.shape or a.dtype != b.dtype:
        shapes = [f"{x.shape[0]} frames of {x.shape[2]}x{x.shape[1]} ({x.dtype})" for x in (a, b)]
        raise ValueError(
            f"{shapes[0]} against {shapes[1]}: must be clips of one length, size and type"
        )


def _tensor(frame: np.ndarray) -> Float[Tensor, "3 h w"]:
    values = torch.from_numpy(np.ascontiguousarray(frame)).double().permute(2, 0, 1)
    return values / 255 if frame.dtype == np.uint8 else values
