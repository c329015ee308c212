"""What is kept of a set's features: sums for the Fréchet distance, some rows for the others.

Both can be added up over any split of the set: the sums to rounding in double precision, the rows
exactly, because which rows are kept depends on the samples' names alone.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dit_accel.eval.results.types import Extractor

KEEP = 10_000
"""Rows kept for nearest neighbours and kernels: 80 MB of 2048 features."""


class FeatureSet:
    """Features of a set, added batch by batch; memory does not grow beyond `keep` rows.

    Args:
        extractor: what made the features. Only sets of one extractor can be merged or compared.
        dims: features of a sample.
        keep: rows to keep; 0 for sums alone.
    """

    def __init__(self, extractor: Extractor, dims: int, *, keep: int = KEEP) -> None:
        self.extractor = extractor
        self.dims = dims
        self.keep = keep
        self.count = 0
        self._sum = torch.zeros(dims, dtype=torch.float64)
        self._products = torch.zeros(dims, dims, dtype=torch.float64)
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._rows = torch.zeros(0, dims, dtype=torch.float32)
        self._waiting: list[tuple[Tensor, Tensor]] = []  # copying the rows for each batch is slow

    def add(self, features: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Add a batch.

        Args:
            features: of any device and precision.
            names: one a row, unique in the set.

        Raises:
            ValueError: features that are not finite, or of another number.
        """
        if features.shape != (len(names), self.dims):
            raise ValueError(
                f"features of shape {tuple(features.shape)}: accepted is {(len(names), self.dims)}"
            )
        finite = features.isfinite().all(1)
        if not finite.all():
            first = names[int((~finite).nonzero()[0])]
            raise ValueError(
                f"{int((~finite).sum())} of {len(names)} samples have features that are not finite, "
                f"{first!r} the first; accepted are finite numbers"
            )
        wide = features.detach().double().cpu()
        self.count += len(wide)
        self._sum += wide.sum(0)
        self._products.addmm_(wide.mT, wide)
        if self.keep:
            self._put(torch.tensor([_key(x) for x in names], dtype=torch.int64), wide.float())

    def merge(self, other: "FeatureSet") -> None:
        """Add what another part of the set gave.

        Raises:
            ValueError: it is of another extractor.
        """
        check_same_extractor(self, other)
        self.count += other.count
        self._sum += other._sum
        self._products += other._products
        self.keep = min(self.keep, other.keep)
        self._put(other.state()["keys"], other.rows())

    def mean(self) -> Float64[Tensor, " d"]:
        """Of every sample."""
        return self._sum / self.count

    def covariance(self) -> Float64[Tensor, "d d"]:
        """Unbiased, of every sample.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(
                f"{self.count} samples: accepted are at least 2, fewer have no covariance"
            )
        mean = self.mean()
        return (self._products - self.count * mean[:, None] * mean) / (self.count - 1)

    def rows(self) -> Float[Tensor, "k d"]:
        """The kept rows, in an order that depends on the samples' names alone."""
        self._trim()
        return self._rows

    def state(self) -> dict[str, Tensor]:
        """All tensors; with `extractor` and `keep` they make up the set."""
        self._trim()
        return {
            "count": torch.tensor(self.count),
            "sum": self._sum,
            "products": self._products,
            "keys": self._keys,
            "rows": self._rows,
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], extractor: Extractor, *, keep: int
    ) -> "FeatureSet":
        """The set that gave this state.

        Raises:
            ValueError: tensors are missing or do not fit each other.
        """
        missing = {"count", "sum", "products", "keys", "rows"} - set(state)
        if missing:
            raise ValueError(f"state without {', '.join(sorted(missing))}: not of a feature set")
        dims, kept = state["sum"].numel(), state["keys"].numel()
        shapes = {"sum": (dims,), "products": (dims, dims), "keys": (kept,), "rows": (kept, dims)}
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise ValueError(
                    f"state[{name!r}] of shape {tuple(state[name].shape)}: accepted is {shape}"
                )
        out = cls(extractor, dims, keep=keep)
        out.count = int(state["count"])
        out._sum, out._products = state["sum"], state["products"]
        out._keys, out._rows = state["keys"], state["rows"]
        return out

    def _put(self, keys: Int64[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
        self._waiting.append((keys, rows))
        if sum(len(x) for x, _ in self._waiting) > max(256, self.keep // 4):
            self._trim()

    def _trim(self) -> None:
        keys = torch.cat([self._keys, *(x for x, _ in self._waiting)])
        rows = torch.cat([self._rows, *(x for _, x in self._waiting)])
        order = keys.argsort()[: self.keep]
        self._keys, self._rows, self._waiting = keys[order], rows[order], []


def check_same_extractor(a: FeatureSet, b: FeatureSet) -> None:
    """Features of two networks cannot be compared.

    Raises:
        ValueError: they are not of one.
    """
    if a.extractor != b.extractor or a.dims != b.dims:
        raise ValueError(
            f"features of {_said(a)} against features of {_said(b)}: accepted is one extractor, with one "
            "sha256 and one way of resizing"
        )


def _said(features: FeatureSet) -> str:
    record = features.extractor
    return f"{record['id']} ({features.dims} features, sha256 {record['sha256'][:12]}, resize {record.get('resize')})"


def _key(name: str) -> int:
    """A number between -2**63 and 2**63 that is as good as random."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int(np.frombuffer(digest, np.int64)[0])
