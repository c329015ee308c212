"""`Linear`: settings of the linear branch."""

from typing import NamedTuple

from torch import Tensor


class Linear(NamedTuple):
    """Feature map and scope of the linear branch, and sums kept by the caller."""

    feature_map: str
    scope: str
    state: tuple[Tensor, Tensor] | None = None
    """Sums over all valid keys: phi(k)^T v `[B, Hkv, D, Dv]` and phi(k) `[B, Hkv, D]`, fp32. None: not given."""
