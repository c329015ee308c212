"""Distances of two clips of the same prompt and seed, on raw frames.

PSNR and SSIM are written out: importing torchmetrics takes seconds and needs a torchvision that works.
"""

import math
import os
import warnings

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from dit_accel.eval.metrics.weights import check_known, file_sha256, import_library, read_weights
from dit_accel.eval.results.types import Extractor

Frames = UInt8[np.ndarray, "t h w 3"] | Float[np.ndarray, "t h w 3"]
"""Bytes, or values in [0, 1]."""
_REACH = 5  # of SSIM's window to each side
LPIPS_BACKBONES = {"alex": "7be5be79", "vgg": "397923af", "squeeze": "b8a52dc0"}
"""torchvision's ImageNet weights, by the start of the file's sha256 (it is in the file's name)."""


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and frames; inf for equal clips."""
    check_sizes(a, b)
    # Frame by frame: a long clip in double precision is large.
    errors = [(_tensor(x) - _tensor(y)).square().mean().item() for x, y in zip(a, b, strict=True)]
    error = float(np.mean(errors))
    return -10 * math.log10(error) if error else math.inf


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity, averaged over pixels, channels and frames.

    As torchmetrics does by default: 11 x 11 Gaussian window of standard deviation 1.5, borders reflected,
    K1 = .01, K2 = .03.
    """
    check_sizes(a, b)
    if min(a.shape[1:3]) <= _REACH:
        raise ValueError(
            f"frames of {a.shape[2]}x{a.shape[1]}: SSIM accepts at least {_REACH + 1}x{_REACH + 1} pixels"
        )
    return float(np.mean([_frame_ssim(_tensor(x), _tensor(y)) for x, y in zip(a, b, strict=True)]))


def _frame_ssim(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"]) -> float:
    mean_a, mean_b, square_a, square_b, product = _smooth(torch.stack([a, b, a * a, b * b, a * b]))
    variance_a = (square_a - mean_a**2).clamp_min(0)
    variance_b = (square_b - mean_b**2).clamp_min(0)
    covariance = product - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (light * structure).mean().item()


def _smooth(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Under the Gaussian window, rows and columns in turn."""
    taps = torch.exp(-0.5 * (torch.arange(-_REACH, _REACH + 1.0, dtype=x.dtype) / 1.5) ** 2)
    taps = taps / taps.sum()
    flat = F.pad(x.flatten(0, 1)[:, None], (_REACH,) * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, taps[None, None, :, None]), taps[None, None, None])
    return flat.reshape(x.shape)


class Lpips:
    """Learned perceptual image patch similarity, averaged over frames.

    Args:
        weights: torchvision's ImageNet weights of the backbone (`alexnet-owt-7be5be79.pth`,
            `vgg16-397923af.pth`, `squeezenet1_1-b8a52dc0.pth`, or their tensors as safetensors). The
            linear layers come with the lpips package.
        net: "alex", "vgg" or "squeeze".
        allow_other_weights: take a file whose sha256 is not torchvision's.
        device: where the network runs.

    Raises:
        ValueError: another net, or a file that does not hold its weights.
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
            raise ValueError(f"net={net!r}: accepted are {', '.join(LPIPS_BACKBONES)}")
        sha256 = file_sha256(weights, "lpips")
        check_known(
            "lpips",
            weights,
            sha256,
            LPIPS_BACKBONES[net],
            f"torchvision's {net}",
            allow_other_weights,
        )
        state = read_weights(weights, "lpips")
        lpips = import_library("lpips", "lpips")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it calls torchvision in an old way
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # Each slice of the backbone keeps torchvision's layer numbers.
        wanted = {k: f"features.{k.split('.', 1)[1]}" for k in model.net.state_dict()}
        try:
            model.net.load_state_dict({k: state[name] for k, name in wanted.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"lpips={str(weights)!r}: does not hold the weights of {net} ({error})"
            ) from None
        self.device = torch.device(device)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.record = Extractor(id=f"lpips-{net}-v0.1", sha256=sha256, resize=None)

    @torch.no_grad()
    def __call__(self, a: Frames, b: Frames) -> float:
        """The mean over frames; 0 for equal clips."""
        check_sizes(a, b)
        try:
            values = [
                self.model(self._input(x), self._input(y), normalize=True).item()
                for x, y in zip(a, b, strict=True)
            ]
        except RuntimeError as error:
            raise ValueError(
                f"frames of {a.shape[2]}x{a.shape[1]}: LPIPS cannot compare them ({error})"
            ) from None
        return float(np.mean(values))

    def _input(self, frame: np.ndarray) -> Tensor:
        return _tensor(frame)[None].float().to(self.device)


def check_sizes(a: np.ndarray, b: np.ndarray) -> None:
    """Two clips of one shape and number type.

    Raises:
        ValueError: they are not.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        shapes = [f"{x.shape[0]} frames of {x.shape[2]}x{x.shape[1]} ({x.dtype})" for x in (a, b)]
        raise ValueError(
            f"{shapes[0]} against {shapes[1]}: accepted are two clips of one length, size and type"
        )


def _tensor(frame: np.ndarray) -> Float[Tensor, "3 h w"]:
    # Bytes wrap around when they are subtracted, so they become numbers first.
    values = torch.from_numpy(np.ascontiguousarray(frame)).double().permute(2, 0, 1)
    return values / 255 if frame.dtype == np.uint8 else values
