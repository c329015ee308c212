"""Frame metrics of two clips, from torchmetrics, on raw frames."""

import math

import numpy as np
import torch
from jaxtyping import Float


def psnr(a: Float[np.ndarray, "t h w 3"], b: Float[np.ndarray, "t h w 3"]) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of [0, 1] frames; inf for equal clips."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if np.array_equal(a, b):
        return math.inf
    return float(peak_signal_noise_ratio(_tensor(a), _tensor(b), data_range=1.0))


def ssim(a: Float[np.ndarray, "t h w 3"], b: Float[np.ndarray, "t h w 3"]) -> float:
    """Structural similarity (11 x 11 Gaussian window), averaged over frames of [0, 1] clips."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(_tensor(a), _tensor(b), data_range=1.0)
    return float(value)  # type: ignore[arg-type]  # a pair only on request


def _tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).double().permute(0, 3, 1, 2)
