"""Totals of the linear branch that follow refreshed tokens, for caches that change little per step."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.linear.features import FEATURE_MAPS, features


@dataclass(frozen=True, eq=False)
class LinearState:
    """Sums over keys, H = sum phi(k) v^T and Z = sum phi(k), which a change of few keys updates cheaply.

    RAS refreshes some tokens per step: `update_` adds what they became and subtracts what they were, at
    a cost that follows the refreshed tokens. Rounding adds up in fp32; start anew at each dense step.
    """

    kv: Float[Tensor, "b h_kv d d_v"]
    """H, fp32 (fp64 for fp64)."""
    k: Float[Tensor, "b h_kv d"]
    """Z."""
    feature_map: str = "softmax"

    def __post_init__(self) -> None:
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map={self.feature_map!r}: accepted are {', '.join(map(repr, FEATURE_MAPS))}"
            )

    @classmethod
    def from_keys(
        cls,
        k: Float[Tensor, "b h_kv l_k d"],
        v: Float[Tensor, "b h_kv l_k d_v"],
        *,
        feature_map: str = "softmax",
        kv_lengths: Int[Tensor, " b"] | None = None,
    ) -> "LinearState":
        """Sums over all keys, or over the first `kv_lengths` `[B]` of each sample."""
        state = cls(
            kv=_wide(k.new_empty(0)).new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]),
            k=_wide(k.new_empty(0)).new_zeros(*k.shape[:2], k.shape[-1]),
            feature_map=feature_map,
        )
        if kv_lengths is not None:
            padding = torch.arange(k.shape[2], device=k.device) >= kv_lengths[:, None]
            padding = padding[:, None, :, None]
            return state._add(k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0), padding)
        return state._add(k, v)

    def update_(
        self,
        k_old: Float[Tensor, "b h_kv n d"],
        v_old: Float[Tensor, "b h_kv n d_v"],
        k_new: Float[Tensor, "b h_kv n d"],
        v_new: Float[Tensor, "b h_kv n d_v"],
    ) -> "LinearState":
        """In place: the given keys and values (of the refreshed tokens only) become the new ones."""
        for name, x, like in (
            ("v_old", v_old, v_new),
            ("k_old", k_old, k_new),
        ):
            if x.shape != like.shape:
                raise ValueError(
                    f"{name}: shape {tuple(x.shape)}, but the new one has {tuple(like.shape)}"
                )
        # One product over old and new together: what does not change cancels before it is rounded.
        phi = torch.cat([self._phi(k_new), -self._phi(k_old)], 2)
        self.kv.add_(phi.mT @ torch.cat([_wide(v_new), _wide(v_old)], 2))
        self.k.add_(phi.sum(2))
        return self

    def update(self, k_old: Tensor, v_old: Tensor, k_new: Tensor, v_new: Tensor) -> "LinearState":
        """As `update_`, into a new state."""
        copy = LinearState(self.kv.clone(), self.k.clone(), self.feature_map)
        return copy.update_(k_old, v_old, k_new, v_new)

    def _phi(self, k: Tensor) -> Tensor:
        return features(_wide(k), self.feature_map)

    def _add(self, k: Tensor, v: Tensor, padding: Tensor | None = None) -> "LinearState":
        phi = self._phi(k)
        if padding is not None:
            phi = phi.masked_fill(padding, 0.0)
        self.kv.add_(phi.mT @ _wide(v))
        self.k.add_(phi.sum(2))
        return self


torch.export.register_dataclass(LinearState)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
