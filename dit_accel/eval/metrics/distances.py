"""Distances of two sets of features: Fréchet, kernel (KID), precision and recall."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dit_accel.eval.metrics.feature_set import FeatureSet, check_same_extractor
from dit_accel.eval.metrics.figures import figure
from dit_accel.eval.results.types import Figure

NEIGHBOURS = 3
SUBSETS, SUBSET_SIZE = 100, 1000
_BLOCK = 256  # rows compared at a time


def frechet_distance(a: FeatureSet, b: FeatureSet) -> float:
    """Between the Gaussians of mean and covariance of the two sets.

    Raises:
        ValueError: fewer than two samples, or different extractors.
    """
    check_same_extractor(a, b)
    return gaussian_distance(a.mean(), a.covariance(), b.mean(), b.covariance())


def gaussian_distance(
    mean_a: Float64[Tensor, " d"],
    covariance_a: Float64[Tensor, "d d"],
    mean_b: Float64[Tensor, " d"],
    covariance_b: Float64[Tensor, "d d"],
) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), exactly, by symmetric eigenvalues.

    C_a C_b has the eigenvalues of the symmetric LᵀC_bL with C_a = LLᵀ: several times faster than
    those of the product itself, or than its square root, and always real.
    """
    with _one_thread():
        triangle, info = torch.linalg.cholesky_ex(covariance_a)
        if info == 0:
            product = _lower_product(triangle, covariance_b)
        else:  # fewer samples than features, or features that never change: the symmetric root, then
            values, vectors = torch.linalg.eigh(covariance_a)
            root = vectors * values.clamp_min(0).sqrt()
            product = root.mT @ covariance_b @ root
        overlap = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    distance = (
        (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    )
    return max(0.0, distance.item())  # rounding can leave it a little below


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Eigenvalue routines wait for all threads after every column; on cores that are not free, as on shared
    machines, several threads are slower than one (2048 features: 1.5 to 5 s against .6 s)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _lower_product(
    triangle: Float64[Tensor, "d d"], matrix: Float64[Tensor, "d d"], block: int = 256
) -> Float64[Tensor, "d d"]:
    """The lower triangle of LᵀML, all that `eigvalsh` reads, without multiplying the zeros of L: a third of
    the operations."""
    out = torch.zeros_like(matrix)
    for i in range(0, len(triangle), block):
        right = matrix[i:, i:] @ triangle[i:, i : i + block]
        out[i:, i : i + block] = triangle[i:, i:].mT @ right
    return out


def frechet_figure(samples: FeatureSet, reference: FeatureSet, **extras: Any) -> Figure:
    """The Fréchet distance; flagged "rank-deficient" where a set has no more samples than features,
    because then it depends on the number of samples above all."""
    flags = list(extras.pop("flags", []))
    if min(samples.count, reference.count) <= samples.dims:
        flags.append("rank-deficient")
    return figure(
        frechet_distance(samples, reference),
        samples.count,
        "squared feature distance",
        extractor=samples.extractor,
        n_reference=reference.count,
        features=samples.dims,
        **({"flags": flags} if flags else {}),
        **extras,
    )


def kernel_distances(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> Float64[np.ndarray, " s"]:
    """Unbiased squared maximum mean discrepancies under (x·y / d + 1)³, one a random subset.

    Where a set has no more rows than `subset_size`, the smaller set's number is the subset's size, and
    where that takes all rows of both there is one subset.

    Raises:
        ValueError: fewer than two rows.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(
            f"subset_size={subset_size}, {len(a)} and {len(b)} samples: accepted are at least 2"
        )
    if size == len(a) == len(b):
        subsets = 1
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (a, b))
        within = _kernel_sum(x, x) + _kernel_sum(y, y)
        for rows in (x, y):
            within -= ((rows.square().sum(1) / rows.shape[1] + 1) ** 3).sum().item()
        values.append(within / (size * (size - 1)) - 2 * _kernel_sum(x, y) / size**2)
    return np.array(values)


def _kernel_sum(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> float:
    dims = x.shape[1]
    return sum(((block @ y.mT / dims + 1) ** 3).sum().item() for block in x.split(_BLOCK))


def kernel_figure(
    samples: FeatureSet,
    reference: FeatureSet,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    **extras: Any,
) -> Figure:
    """Mean over the subsets, of the rows that were kept; `std` is None where there is one subset."""
    check_same_extractor(samples, reference)
    a, b = samples.rows(), reference.rows()
    values = kernel_distances(a, b, subsets=subsets, subset_size=subset_size, seed=seed)
    size = min(subset_size, len(a), len(b))
    if size < subset_size:
        extras["flags"] = [*extras.get("flags", []), f"subsets of {size}"]
    return figure(
        values.mean(),
        len(a),
        "squared kernel distance",
        extractor=samples.extractor,
        n_reference=len(b),
        std=float(values.std()) if len(values) > 1 else None,
        subsets=len(values),
        subset_size=size,
        **extras,
    )


def precision_recall(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of samples inside the reference's balls, and of the reference inside the samples'.

    A row's ball reaches to its `neighbours`-th nearest other row of the same set.

    Raises:
        ValueError: a set has no more rows than `neighbours`.
    """
    if not 0 < neighbours < min(len(samples), len(reference)):
        raise ValueError(
            f"neighbours={neighbours}, {len(samples)} and {len(reference)} samples: accepted is a number "
            "from 1 to less than the samples of both"
        )
    a, b = samples.double(), reference.double()
    inside = _covered(a, b, neighbours), _covered(b, a, neighbours)
    return inside[0].double().mean().item(), inside[1].double().mean().item()


def _covered(
    points: Float64[Tensor, "n d"], centres: Float64[Tensor, "m d"], neighbours: int
) -> Bool[Tensor, " n"]:
    # The nearest row of its own set is the row itself.
    reach = torch.cat(
        [
            torch.cdist(block, centres).kthvalue(neighbours + 1).values
            for block in centres.split(_BLOCK)
        ]
    )
    return torch.cat([(torch.cdist(x, centres) <= reach).any(1) for x in points.split(_BLOCK)])


def precision_recall_figures(
    samples: FeatureSet, reference: FeatureSet, *, neighbours: int = NEIGHBOURS, **extras: Any
) -> tuple[Figure, Figure]:
    """Both, of the rows that were kept."""
    check_same_extractor(samples, reference)
    a, b = samples.rows(), reference.rows()
    precision, recall = precision_recall(a, b, neighbours=neighbours)
    about: dict[str, Any] = {"extractor": samples.extractor, "neighbours": neighbours, **extras}
    return (
        figure(precision, len(a), "share", n_reference=len(b), **about),
        figure(recall, len(a), "share", n_reference=len(b), **about),
    )
