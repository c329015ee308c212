"""`query_block`: query block of a device; `joint_geometry`: lengths and blocks of a call, cached for all layers and steps."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.config import SLAConfig
from dit_accel.kernels import Geometry


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def query_block(config: SLAConfig, device: torch.device) -> int:
    """Return the number of tokens in a query block on a device."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return config.query_block(_capability(device) if nvidia else None)


def joint_geometry(
    q: Tensor,
    tokens: int,
    text: int,
    *,
    block_q: int,
    block_k: int,
    text_lengths: Tensor | None = None,
) -> Geometry:
    """Return the geometry of the keys `[image, padding to whole blocks, text]`.

    Args:
        q: image queries `[B, H, L, D]`; only length and device are used.
        tokens: number of image keys.
        text: number of text keys; with 0, image keys are not padded.
        block_q, block_k: number of tokens in a block.
        text_lengths: `[B]`, number of text keys of each row without padding. Default: no padding.
    """
    geometry = _without_padding(q, tokens, text, block_q, block_k)
    if text_lengths is None:
        return geometry
    # The text is last, so its padding is the end of the row.
    lengths = text_lengths + (geometry.kv_len - text)
    return replace(geometry, kv_lengths=lengths.to(torch.int32))


def _without_padding(q: Tensor, tokens: int, text: int, block_q: int, block_k: int) -> Geometry:
    numbers = q.shape[2], tokens, text, block_q, block_k, q.device
    # Cached numbers would become constants of a compiled graph. Tensors that are made while a CUDA graph is captured
    # are invalid outside of it, and fake tensors hold no values.
    if (
        torch.compiler.is_compiling()
        or type(q) is not Tensor
        or (q.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return _make(*numbers)
    return _kept(*numbers)


@torch.inference_mode(False)  # cached tensors are also used in calls with gradients
def _make(
    queries: int, tokens: int, text: int, block_q: int, block_k: int, device: torch.device
) -> Geometry:
    gap, sizes = -tokens % block_k if text else 0, None
    kv_len = tokens + gap + text
    if gap:
        starts = torch.arange(-(-kv_len // block_k), device=device) * block_k
        # Text blocks are complete except for the last one, whose end follows from kv_len.
        sizes = torch.where(starts < tokens, tokens - starts, block_k).clamp(max=block_k)
    return Geometry.of(
        device, block_q=block_q, block_k=block_k, q_len=queries, kv_len=kv_len, k_block_sizes=sizes
    )


_kept = functools.lru_cache(maxsize=128)(_make)
