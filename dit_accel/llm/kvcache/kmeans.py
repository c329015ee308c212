"""Batched k-means: solves many small problems at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.llm.kvcache.quantizer import nearest

FIRST = 8
"""Number of vectors per centroid for the k-means++ initialisation. More would take most of the time and help little."""


def kmeans(
    x: Float[Tensor, "m n w"], count: int, *, rounds: int, seed: int = 0
) -> Float[Tensor, "m c w"]:
    """Return the centroids of each of `m` sets of vectors (Lloyd's algorithm).

    If a set has at most `count` different vectors, these vectors are its centroids.

    Args:
        x: fp32 vectors.
        count: number of centroids `c` per set.
        rounds: maximum number of rounds. Stops earlier when no assignment changes.
        seed: seed of the initialisation.
    """
    few: dict[int, Tensor] = {}
    for i, y in enumerate(x):
        # `unique` of all vectors is slow, so test a subset first. Sets with few different vectors are rare.
        if len(torch.unique(y[: 2 * count], dim=0)) <= count:
            different = torch.unique(y, dim=0)
            if len(different) <= count:
                few[i] = different
    step = max(1, x.shape[1] // (FIRST * count))
    centroids = _first(x[:, ::step], count, torch.Generator(x.device).manual_seed(seed))
    before = None
    for _ in range(rounds):
        codes = nearest(x, centroids)
        if before is not None and torch.equal(codes, before):
            break
        centroids, before = _means(x, codes, centroids), codes
    for i, different in few.items():
        centroids[i, : len(different)] = different
        centroids[i, len(different) :] = different[-1]
    return centroids


def _first(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return initial centroids by k-means++: each is drawn with the squared distance from earlier ones as its weight."""
    chosen = [x[:, :1]]
    distance = torch.full_like(x[..., 0], torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (x - chosen[-1]).square().sum(-1))
        # If all distances are 0, draw uniformly, because multinomial needs a positive weight.
        weights = torch.where(distance.sum(1, keepdim=True) > 0, distance, 1.0)
        at = torch.multinomial(weights, 1, generator=generator)
        chosen.append(x.gather(1, at[..., None].expand(-1, -1, x.shape[2])))
    return torch.cat(chosen, 1)


def _means(x: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """Return the mean of the vectors of each centroid. A centroid without vectors moves to a vector with a large error."""
    sums = torch.zeros_like(centroids)
    sums.scatter_add_(1, codes[..., None].expand_as(x), x)
    counts = torch.zeros(centroids.shape[:2], device=x.device)
    counts.scatter_add_(1, codes, torch.ones_like(x[..., 0]))
    means = sums / counts.clamp(min=1)[..., None]
    empty = counts == 0
    for i in empty.any(1).nonzero()[:, 0].tolist():
        errors = (x[i] - means[i, codes[i]]).square().sum(-1)
        gone = empty[i].nonzero()[:, 0][: len(errors)]
        means[i, gone] = x[i, errors.topk(len(gone)).indices]
    return means
