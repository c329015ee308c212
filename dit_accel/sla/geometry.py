"""Query blocks of a device; `joint_geometry`: lengths and blocks of a call, made once for every layer and step."""

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
    """Return the tokens per query block on this device."""
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
        q: image queries, `[B, H, L, D]`; length and device count.
        tokens: image keys.
        text: text keys; 0: there is no padding.
        block_q, block_k: tokens per block.
        text_lengths: `[B]`, text keys of each row that count. Default: all do.
    """
    geometry = _without_padding(q, tokens, text, block_q, block_k)
    if text_lengths is None:
        return geometry
    # The text stands last, so that its padding is the end of the row.
    lengths = text_lengths + (geometry.kv_len - text)
    return replace(geometry, kv_lengths=lengths.to(torch.int32))


def _without_padding(q: Tensor, tokens: int, text: int, block_q: int, block_k: int) -> Geometry:
    numbers = q.shape[2], tokens, text, block_q, block_k, q.device
    # Numbers kept in objects become constants of a compiled graph; a tensor made while a CUDA graph is
    # captured holds nothing outside of it, and a fake one never does.
    if (
        torch.compiler.is_compiling()
        or type(q) is not Tensor
        or (q.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return _make(*numbers)
    return _kept(*numbers)


@torch.inference_mode(False)  # a kept tensor also serves calls with gradients
def _make(
    queries: int, tokens: int, text: int, block_q: int, block_k: int, device: torch.device
) -> Geometry:
    gap, sizes = -tokens % block_k if text else 0, None
    kv_len = tokens + gap + text
    if gap:
        starts = torch.arange(-(-kv_len // block_k), device=device) * block_k
        # Text blocks are whole but the last one, whose end follows from the length.
        sizes = torch.where(starts < tokens, tokens - starts, block_k).clamp(max=block_k)
    return Geometry.of(
        device, block_q=block_q, block_k=block_k, q_len=queries, kv_len=kv_len, k_block_sizes=sizes
    )


_kept = functools.lru_cache(maxsize=128)(_make)
