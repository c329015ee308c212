"""Totals of the linear branch that follow refreshed tokens, for caches that change little per step."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.linear.features import FEATURE_MAPS, features
from dit_accel.kernels.lists import check_range, reads_freely
from dit_accel.kernels.precision import no_autocast, wide


@dataclass(frozen=True, eq=False)
class LinearState:
    """Sums over keys, H = sum phi(k) v^T and Z = sum phi(k), which a change of few keys updates cheaply.

    RAS refreshes some tokens per step: `update_` adds what they became and subtracts what they were,

        H += phi(k_new)^T v_new - phi(k_old)^T v_old      Z += sum phi(k_new) - sum phi(k_old)

    at a cost that follows the refreshed tokens. Rounding adds up in fp32; start anew at each dense
    step. Carries no gradient.
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
    @torch.no_grad()
    def from_keys(
        cls,
        k: Float[Tensor, "b h_kv l_k d"],
        v: Float[Tensor, "b h_kv l_k d_v"],
        *,
        feature_map: str = "softmax",
        kv_lengths: Int[Tensor, " b"] | None = None,
    ) -> "LinearState":
        """Sums over all keys, or over the first `kv_lengths` `[B]` of each sample.

        Raises:
            ValueError: shapes that do not fit, or an unknown `feature_map`; it names the argument.
        """
        for name, x in (("k", k), ("v", v)):
            if not x.is_floating_point():
                raise ValueError(f"{name}: dtype {x.dtype}; accepted are floating point ones")
        if k.shape[:-1] != v.shape[:-1]:
            raise ValueError(f"v: shape {tuple(v.shape)} does not fit k {tuple(k.shape)}")
        padding = None
        if kv_lengths is not None:
            if tuple(kv_lengths.shape) != (len(k),):
                raise ValueError(
                    f"kv_lengths: shape {tuple(kv_lengths.shape)}; accepted is ({len(k)},)"
                )
            if reads_freely(kv_lengths):
                check_range("kv_lengths", kv_lengths, k.shape[2])
            padding = torch.arange(k.shape[2], device=k.device) >= kv_lengths[:, None]
            padding = padding[:, None, :, None]
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)  # they may hold NaN
        phi = features(k.to(wide(k)), feature_map)
        if padding is not None:
            phi = phi.masked_fill(padding, 0.0)  # phi(0) is not 0
        with no_autocast(k):
            return cls(phi.mT @ v.to(phi.dtype), phi.sum(2), feature_map)

    @torch.no_grad()
    def set_(
        self, k: Float[Tensor, "b h_kv l_k d"], v: Float[Tensor, "b h_kv l_k d_v"]
    ) -> "LinearState":
        """In place: sums over these keys, whatever it has summed before.

        Returns:
            This state.
        """
        new = self.from_keys(k, v, feature_map=self.feature_map)
        self.kv.copy_(new.kv)
        self.k.copy_(new.k)
        return self

    def update_(
        self,
        k_old: Float[Tensor, "b h_kv n d"],
        v_old: Float[Tensor, "b h_kv n d_v"],
        k_new: Float[Tensor, "b h_kv n d"],
        v_new: Float[Tensor, "b h_kv n d_v"],
    ) -> "LinearState":
        """In place: the given keys and values (of the refreshed tokens only) become the new ones.

        Args:
            k_old, v_old: exactly what the state has summed for these tokens, `n` may be 0.
            k_new, v_new: what takes their place.

        Returns:
            This state.

        Raises:
            ValueError: a shape or device that does not fit the state; it names the argument.
        """
        b, h, d, d_v = self.kv.shape
        n = k_old.shape[2] if k_old.ndim == 4 else 0
        for name, x, width in (
            ("k_old", k_old, d),
            ("v_old", v_old, d_v),
            ("k_new", k_new, d),
            ("v_new", v_new, d_v),
        ):
            if tuple(x.shape) != (b, h, n, width) or x.device != self.kv.device:
                raise ValueError(
                    f"{name}: shape {tuple(x.shape)} on {x.device}; "
                    f"accepted is {(b, h, n, width)} on {self.kv.device}"
                )
        with torch.no_grad(), no_autocast(self.kv):
            # One product over old and new, so that the small difference is formed before it meets H.
            phi = torch.cat([self._phi(k_new), -self._phi(k_old)], 2)
            v = torch.cat([v_new, v_old], 2)
            self.kv.add_(phi.mT @ v.to(phi.dtype))
            self.k.add_(phi.sum(2))
        return self

    def update(
        self,
        k_old: Float[Tensor, "b h_kv n d"],
        v_old: Float[Tensor, "b h_kv n d_v"],
        k_new: Float[Tensor, "b h_kv n d"],
        v_new: Float[Tensor, "b h_kv n d_v"],
    ) -> "LinearState":
        """As `update_`, into a new state."""
        copy = LinearState(self.kv.clone(), self.k.clone(), self.feature_map)
        return copy.update_(k_old, v_old, k_new, v_new)

    def _phi(self, k: Tensor) -> Tensor:
        return features(k.to(wide(k)), self.feature_map)


torch.export.register_dataclass(LinearState)
