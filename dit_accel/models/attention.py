"""`SparseProcessor`: what the attention processors of all families share."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SparseProcessor:
    """An attention processor that stands in for one of diffusers, `stock`.

    It has two seams, None at first; without them it computes what `stock` computes. See `Family.processor`.
    """

    attend: Any = None
    kv_store: Any = None
    text: tuple[Tensor, ...] | None = None
    """Cross-attention only: keys and values of the text, computed before."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def release(self) -> Any:
        """Let go of the seams, so that a copy that somebody kept is harmless; returns `stock`."""
        self.attend = self.kv_store = self.text = None
        return self.stock


def computed_once(attn: Any, compute: Callable[..., Any], text: Tensor) -> Any:
    """`compute(attn, text)`; None where the weights are elsewhere (block-wise offloading): then the
    processor has to compute it in each call."""
    return compute(attn, text) if next(attn.parameters()).device == text.device else None


def grouped_attention(
    query: Float[Tensor, "b l h d"],
    key: Float[Tensor, "b m h_kv d"],
    value: Float[Tensor, "b m h_kv d"],
    mask: Tensor | None,
    scale: float | None,
) -> Float[Tensor, "b l h d"]:
    """Dense attention; `mask` `[B, M]` is true (or 1) for keys that count."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask.bool()[:, None, None]
    # Grouped heads are repeated as diffusers does: SDPA's own grouping is slower with a mask.
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).to(query.dtype)


def projections(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of self-attention, fused or not."""
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
