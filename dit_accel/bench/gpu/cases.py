"""Measured shapes and modes, and an attention layer that works as in a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.bench.gpu.dense import DenseTile, dense_attention
from dit_accel.bench.gpu.device import Device
from dit_accel.bench.timing import Functions
from dit_accel.kernels import SparsePlan, block_scores, sparse_linear_attention

MODES: dict[str, dict[str, str]] = {
    "none": {"combine": "none"},
    "all": {"combine": "proj", "linear_scope": "all"},
    "complement": {"combine": "proj", "linear_scope": "complement"},
    "shared_softmax": {"combine": "shared_softmax"},
    "marginal": {"combine": "proj", "linear_scope": "marginal"},
    "alpha": {"combine": "alpha", "linear_scope": "complement"},
}
DTYPE = torch.bfloat16
SKIP = 0.1
DENSE_TORCH = ("flash", "cudnn")


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention layer. Queries and keys are image tokens, followed by text tokens."""

    name: str
    heads: int
    tokens: int
    head_dim: int
    batch: int = 1
    text: int = 0
    block_q: int = 128
    block_k: int = 64

    @property
    def length(self) -> int:
        return self.tokens + self.text

    @property
    def flops(self) -> float:
        """FLOPs of a dense forward pass: two products."""
        return 4.0 * self.batch * self.heads * self.length**2 * self.head_dim


WAN = Shape("Wan2.1 1.3B 480p", 12, 32760, 128)
WAN_720P = Shape("Wan2.1 14B 720p", 40, 75600, 128)
SD3 = Shape("SD3 1024", 24, 4096, 64, batch=2, text=333)


def inputs(device: Device, shape: Shape, *, grad: bool = False) -> list[Tensor]:
    """Return q, k, v `[B, H, L, D]` in `DTYPE`, with the memory layout `[B, L, H, D]` of transformers."""
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    tensors = (
        torch.randn(size, device=device.place, dtype=DTYPE).transpose(1, 2) for _ in range(3)
    )
    return [x.requires_grad_(grad) for x in tensors]


def weights(device: Device, mode: str, shape: Shape) -> dict[str, Any]:
    """Return the arguments of `sparse_linear_attention` of a mode."""
    options: dict[str, Any] = dict(MODES[mode])
    if options["combine"] == "proj":
        matrix = torch.randn(shape.head_dim, shape.head_dim, device=device.place)
        options["proj_weight"] = (matrix / shape.head_dim**0.5).to(DTYPE)
        options["proj_bias"] = torch.randn(shape.head_dim, device=device.place, dtype=DTYPE)
    elif options["combine"] == "alpha":
        options["alpha"] = torch.full((shape.heads,), 0.5, device=device.place)
    return options


class Layer:
    """Attention layer in one mode. It routes, plans and attends, as `SparseLinearAttention` does.

    Args:
        device: device of the tensors.
        shape: sizes of the layer. With text, `tokens` must be a multiple of `block_k`.
        mode: a name of `MODES`.
        topk: fraction of key blocks that each query block reads.
        spread: the router also uses second moments, as by default in `SLAConfig`.
        backend: backend of the attention.
    """

    def __init__(
        self,
        device: Device,
        shape: Shape,
        mode: str,
        topk: float,
        *,
        spread: bool = True,
        backend: Any = None,
    ) -> None:
        self.shape, self.mode, self.topk, self.spread = shape, mode, topk, spread
        self.options = {**weights(device, mode, shape), "backend": backend}

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        n = self.shape.tokens
        return block_scores(
            q[:, :, :n],
            k[:, :, :n],
            block_q=self.shape.block_q,
            block_k=self.shape.block_k,
            spread=self.spread,
        )

    def plan(self, scores: Tensor) -> SparsePlan:
        s = self.shape
        return SparsePlan.from_scores(
            scores,
            topk=self.topk,
            skip=SKIP if self.mode == "marginal" else 0.0,
            tail_blocks=-(-s.text // s.block_k),
            block_q=s.block_q,
            block_k=s.block_k,
            q_len=s.tokens,
            kv_len=s.length,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> Tensor:
        """Return the output of all tokens. Text queries read every key."""
        n = self.shape.tokens
        o = sparse_linear_attention(q[:, :, :n], k, v, plan, **self.options)
        if not self.shape.text:
            return o
        return torch.cat([o, F.scaled_dot_product_attention(q[:, :, n:], k, v)], 2)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, self.plan(self.route(q, k)))

    def density(self, device: Device, plan: SparsePlan) -> float:
        """Return the share of (query, key) pairs that are attended, text included."""
        share = self.shape.tokens / self.shape.length
        return device.number(plan.density) * share + 1 - share


def dense_functions(
    device: Device, q: Tensor, k: Tensor, v: Tensor, tile: DenseTile | None
) -> Functions:
    """Return functions for torch's flash and cuDNN attention, and for the dense Triton kernel if a tile is given."""

    def of(backend: SDPBackend) -> Callable[[], Any]:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    found: Functions = {
        "flash": of(SDPBackend.FLASH_ATTENTION),
        "cudnn": of(SDPBackend.CUDNN_ATTENTION),
    }
    if tile is not None:
        found["dense triton"] = lambda: dense_attention(q, k, v, tile)
    return found
