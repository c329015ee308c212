"""`LinearState`: sums of the linear branch, updated at the cost of the keys that change."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.linear.features import FEATURE_MAPS, features
from dit_accel.kernels.lists import check_range, reads_freely
from dit_accel.kernels.precision import no_autocast, wide


@dataclass(frozen=True, eq=False)
class LinearState:
    """Sums over keys, H = sum phi(k) v^T and Z = sum phi(k), with an update for few changed keys.

    RAS refreshes some tokens per step. `update_` adds their new keys and subtracts their old keys:

        H += phi(k_new)^T v_new - phi(k_old)^T v_old      Z += sum phi(k_new) - sum phi(k_old)

    The cost is proportional to the number of refreshed tokens. Rounding errors accumulate in fp32, so call `set_` at
    each dense step. The state has no gradient.
    """

    kv: Float[Tensor, "b h_kv d d_v"]
    """H = sum phi(k) v^T, fp32 (fp64 for fp64)."""
    k: Float[Tensor, "b h_kv d"]
    """Z = sum phi(k), of the same dtype."""
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
        """Return the sums over all keys, or over the first `kv_lengths` `[B]` keys of each sample.

        Raises:
            ValueError: shapes do not match, or `feature_map` is unknown; the message names the argument.
        """
        for name, x in (("k", k), ("v", v)):
            if not x.is_floating_point():
                raise ValueError(f"{name}: dtype {x.dtype}; accepted are floating-point dtypes")
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
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)  # padding may hold NaN
        phi = features(k.to(wide(k)), feature_map)
        if padding is not None:
            phi = phi.masked_fill(padding, 0.0)  # phi(0) is not 0
        with no_autocast(k):
            return cls(phi.mT @ v.to(phi.dtype), phi.sum(2), feature_map)

    @torch.no_grad()
    def set_(
        self, k: Float[Tensor, "b h_kv l_k d"], v: Float[Tensor, "b h_kv l_k d_v"]
    ) -> "LinearState":
        """Replace the sums, in place, by those over the given keys.

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
        """Replace old by new keys and values of the refreshed tokens, in place.

        Args:
            k_old, v_old: keys and values that the state includes for these tokens. `n` may be 0.
            k_new, v_new: new keys and values of these tokens.

        Returns:
            This state.

        Raises:
            ValueError: a shape or device does not match the state; the message names the argument.
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
            # One product over old and new keys, so that the small difference is formed before it is added to H.
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
        """Return a new state with the change of `update_`; this state stays as it is."""
        copy = LinearState(self.kv.clone(), self.k.clone(), self.feature_map)
        return copy.update_(k_old, v_old, k_new, v_new)

    def _phi(self, k: Tensor) -> Tensor:
        return features(k.to(wide(k)), self.feature_map)


torch.export.register_dataclass(LinearState)
