"""Features of a set, and distances of two such sets: Fréchet, kernel (KID), precision and recall.

`FeatureSet` is our own because torchmetrics' FID holds both sets in one object, which cannot be saved for one
set and merged from parts, and because its KID keeps every feature, so that memory grows with the set.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dit_accel.eval.metrics.values import metric_value
from dit_accel.eval.results.types import Extractor, MetricValue

KEEP = 10_000
"""Rows kept for kernel distances, precision and recall: 80 MB of 2,048 features."""
NEIGHBOURS = 3
SUBSETS, SUBSET_SIZE = 100, 1000
_BLOCK = 256  # rows compared at a time


class FeatureSet:
    """Sums and some rows of a set's features; memory does not grow beyond the kept rows.

    Parts of a set can be merged. The sums are then equal to rounding in double precision. The kept rows are
    equal to the last bit, because a hash of the samples' names chooses them.

    Args:
        extractor: identity of the network. Only features of one network can be merged or compared.
        dims: features of a sample.
        keep: number of rows to keep; 0 for the Fréchet distance, which needs the sums alone.
    """

    def __init__(self, extractor: Extractor, dims: int, *, keep: int = KEEP) -> None:
        self.extractor, self.dims, self.keep, self.count = extractor, dims, keep, 0
        self._sum = torch.zeros(dims, dtype=torch.float64)
        self._products = torch.zeros(dims, dims, dtype=torch.float64)
        self._kept = [(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dims))]

    def add(self, features: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Add a batch of rows, with one name per row that is unique in the set."""
        if wrong := (~features.isfinite().all(1)).nonzero()[:, 0].tolist():
            raise ValueError(
                f"features: {len(wrong)} of {len(names)} samples, {names[wrong[0]]!r} the first, have values "
                "that are not finite: must be finite numbers"
            )
        wide = features.detach().double().cpu()
        self.count += len(wide)
        self._sum += wide.sum(0)
        self._products.addmm_(wide.mT, wide)
        if self.keep:
            self._put(torch.tensor([_key(x) for x in names], dtype=torch.int64), wide.float())

    def merged(self, other: "FeatureSet") -> "FeatureSet":
        """Add another part of the set, and return this one."""
        check_same_extractor(self, other)
        self.count += other.count
        self._sum += other._sum
        self._products += other._products
        self.keep = min(self.keep, other.keep)
        for keys, rows in other._kept:
            self._put(keys, rows)
        return self

    def mean(self) -> Float64[Tensor, " d"]:
        return self._sum / self.count

    def covariance(self) -> Float64[Tensor, "d d"]:
        """Return the unbiased covariance."""
        mean = self.mean()
        return (self._products - self.count * mean[:, None] * mean) / (self.count - 1)

    def rows(self) -> Float[Tensor, "k d"]:
        """Return the kept rows, in an order that depends on the samples' names alone."""
        return self._trimmed()[1]

    def state(self) -> dict[str, Tensor]:
        """Return all tensors; with `extractor` and `keep` they describe the set."""
        keys, rows = self._trimmed()
        sums = {"sum": self._sum, "products": self._products}
        return {"count": torch.tensor(self.count), **sums, "keys": keys, "rows": rows}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], extractor: Extractor, keep: int) -> "FeatureSet":
        """Return the set that gave this state."""
        out = cls(extractor, len(state["sum"]), keep=keep)
        out.count, out._kept = int(state["count"]), [(state["keys"], state["rows"])]
        out._sum, out._products = state["sum"], state["products"]
        return out

    def _put(self, keys: Int64[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
        self._kept.append((keys, rows))
        # Sorting and copying the rows after every batch would be slow.
        if sum(len(x) for x, _ in self._kept) > self.keep + max(256, self.keep // 4):
            self._trimmed()

    def _trimmed(self) -> tuple[Int64[Tensor, " k"], Float[Tensor, "k d"]]:
        """Keep the rows with the smallest hashes, sorted by them."""
        keys, rows = (torch.cat(x) for x in zip(*self._kept, strict=True))
        order = keys.argsort()[: self.keep]
        self._kept = [(keys[order], rows[order])]
        return self._kept[0]


def check_same_extractor(a: FeatureSet, b: FeatureSet) -> None:
    """Raise ValueError unless both sets have features of one network."""
    said = [f"{x.dims} features of {x.extractor}" for x in (a, b)]
    if said[0] != said[1]:
        raise ValueError(
            f"{said[0]} against {said[1]}: must be one extractor, with one sha256 and one way of resizing"
        )


def _key(name: str) -> int:
    """Return a hash of the name as a 64-bit integer."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int(np.frombuffer(digest, np.int64)[0])


def compare_features(
    distance: str, samples: FeatureSet, reference: FeatureSet, flags: Sequence[str], **extras: Any
) -> MetricValue:
    """Return a distance of two sets: "frechet", "kernel", "precision" or "recall".

    To the flags of the network it adds "rank-deficient" for a Fréchet distance of no more samples than features,
    which depends mostly on their number, and "subsets of n" for smaller kernel subsets.
    """
    check_same_extractor(samples, reference)
    flags, counts, unit = list(flags), (samples.count, reference.count), "share"
    if distance == "frechet":
        value, unit = frechet_distance(samples, reference), "squared feature distance"
        extras["features"] = samples.dims
        if min(counts) <= samples.dims:
            flags.append("rank-deficient")
    else:
        rows = samples.rows(), reference.rows()
        counts = len(rows[0]), len(rows[1])
        if distance == "kernel":
            values, unit = kernel_distances(*rows), "squared kernel distance"
            value, size = values.mean(), min(SUBSET_SIZE, *counts)
            extras["std"] = float(values.std()) if len(values) > 1 else None
            extras |= {"subsets": len(values), "subset_size": size}
            if size < SUBSET_SIZE:
                flags.append(f"subsets of {size}")
        else:
            value = coverage(*(rows if distance == "precision" else rows[::-1]))
            extras["neighbours"] = NEIGHBOURS
    extras |= {"flags": flags} if flags else {}
    extras |= {"extractor": samples.extractor, "n_reference": counts[1]}
    return metric_value(float(value), counts[0], unit, **extras)


def frechet_distance(a: FeatureSet, b: FeatureSet) -> float:
    """Return |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of the sets' means and covariances.

    With C_a = R Rᵀ, C_a C_b has the eigenvalues of the symmetric RᵀC_bR. They are real, and computed in less
    time than those of the product, which torchmetrics takes.
    """
    covariance_a, covariance_b = a.covariance(), b.covariance()
    root, failed = torch.linalg.cholesky_ex(covariance_a)
    if failed:  # no full rank: fewer samples than features, or constant features
        values, vectors = torch.linalg.eigh(covariance_a)
        root = vectors * values.clamp_min(0).sqrt()
    overlap = torch.linalg.eigvalsh(root.mT @ covariance_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean() - b.mean()).square().sum()
    distance = means + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(0.0, distance.item())  # rounding can make it negative


def kernel_distances(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
) -> Float64[np.ndarray, " s"]:
    """Return unbiased squared maximum mean discrepancies under (x·y / d + 1)³ of random subsets.

    A subset has at most as many rows as the smaller set. There is one subset if it has all rows of both.
    """
    from torchmetrics.image.kid import poly_mmd

    size = min(size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1
    rng = np.random.default_rng(0)
    values = []
    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (a, b))
        values.append(poly_mmd(x, y).item())
    return np.array(values)


def coverage(
    points: Float[Tensor, "n d"], centres: Float[Tensor, "m d"], *, neighbours: int = NEIGHBOURS
) -> float:
    """Return the share of points inside a ball: precision of samples in the balls of a reference, recall the reverse.

    The ball of a centre reaches to its `neighbours`-th nearest other centre. Distances are computed `_BLOCK` rows at a
    time.
    """
    points, centres = points.double(), centres.double()
    reach = [  # + 1, because the nearest centre is the centre itself
        torch.cdist(x, centres).kthvalue(neighbours + 1).values for x in centres.split(_BLOCK)
    ]
    radii = torch.cat(reach)
    inside = [(torch.cdist(x, centres) <= radii).any(1) for x in points.split(_BLOCK)]
    return torch.cat(inside).double().mean().item()
