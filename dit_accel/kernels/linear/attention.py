"""Linear attention over all keys, in plain torch."""

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.kernels.linear.features import features
from dit_accel.kernels.linear.state import LinearState
from dit_accel.kernels.precision import no_autocast, wide

EPSILON = 1e-5
"""Constant in the denominator over all keys, as in the training of the released checkpoints."""


def linear_attention(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    *,
    feature_map: str = "softmax",
    state: LinearState | None = None,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return phi(q) (sum phi(k)^T v) / (phi(q) sum phi(k) + 1e-5), in fp32 or wider. Differentiable.

    Args:
        q: queries `[B, Hq, Lq, D]`.
        k, v: keys and values `[B, Hkv, Lk, D]`; `Hq` is a multiple of `Hkv`.
        feature_map: "softmax" over D, "elu" (+ 1) or "relu", applied to unscaled q and k.
        state: both sums, kept by the caller; without gradient. Default: they are computed from the keys.
    """
    with no_autocast(q):
        if state is None:
            phi_k = features(k.to(wide(k)), feature_map)
            total, norm = phi_k.mT @ v.to(phi_k.dtype), phi_k.sum(2)
        else:
            total, norm = state.kv, state.k
        phi_q = features(q.to(total.dtype), feature_map).unflatten(1, (k.shape[1], -1))
        sums = phi_q @ total[:, :, None]
        weights = (phi_q * norm[:, :, None, None]).sum(-1, keepdim=True) + EPSILON
        return (sums / weights).flatten(1, 2).to(torch.promote_types(q.dtype, v.dtype))
