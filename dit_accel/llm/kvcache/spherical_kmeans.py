"""Segmented spherical k-means clustering of keys, as in RetroInfer (arXiv 2505.02922)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dit_accel.llm.kvcache.partial import SCORES


def cluster_keys(
    k: Float[Tensor, "b h n d"],
    valid: Bool[Tensor, "b _h n"] | None,
    *,
    size: int,
    segment: int = 8192,
    rounds: int = 10,
) -> tuple[Int[Tensor, "b h n"], int]:
    """Return the cluster of each key, and the number of clusters.

    The mean key is subtracted first. All rounds except the last one work within segments of the sequence. In the last
    round, keys choose among the clusters of all segments.

    Args:
        k: keys.
        valid: True for real keys; other keys get the number of clusters as their label. Default: all are real.
        size: mean number of keys per cluster.
        segment: number of keys per segment.
        rounds: number of assignment rounds.
    """
    rows, heads, length, _ = k.shape
    x = k.float().flatten(0, 1)
    real = None if valid is None else valid.expand(-1, heads, -1).flatten(0, 1)
    if real is None:
        x = x - x.mean(1, keepdim=True)
    else:
        count = real.sum(1).clamp(min=1)[:, None, None]
        x = x - (x * real[..., None]).sum(1, keepdim=True) / count
    segments = max(1, round(length / segment))
    pieces = x.tensor_split(segments, 1)
    masks = [None] * segments if real is None else real.tensor_split(segments, 1)
    centres = torch.cat(
        [
            _centres(piece, mask, max(1, round(piece.shape[1] / size)), rounds - 1)
            for piece, mask in zip(pieces, masks, strict=True)
        ],
        1,
    )
    labels = _nearest(x, centres, real)
    return labels.unflatten(0, (rows, heads)), centres.shape[1]


def sums(
    x: Float[Tensor, "b n d"], labels: Int[Tensor, "b n"], clusters: int
) -> Float[Tensor, "b m d"]:
    """Return the sum of the vectors of each cluster. Vectors with the label `clusters` belong to no cluster."""
    found = x.new_zeros(x.shape[0], clusters + 1, x.shape[2])
    found.scatter_add_(1, labels[..., None].expand_as(x), x)
    return found[:, :clusters]


def _centres(x: Tensor, real: Tensor | None, clusters: int, rounds: int) -> Float[Tensor, "b m d"]:
    """Return cluster centres of norm 1, initialised with evenly spaced keys."""
    at = torch.arange(clusters, device=x.device)
    if real is None:
        first = (at * x.shape[1] // clusters).expand(x.shape[0], -1)
    else:
        order = (~real).long().argsort(dim=1, stable=True)
        first = order.gather(1, at * real.sum(1, keepdim=True) // clusters)
    centres = functional.normalize(x.gather(1, first[..., None].expand(-1, -1, x.shape[2])), dim=-1)
    for _ in range(rounds):
        found = sums(x, _nearest(x, centres, real), clusters)
        empty = found.abs().amax(-1, keepdim=True) == 0
        centres = torch.where(empty, centres, functional.normalize(found, dim=-1))
    return centres


def _nearest(x: Tensor, centres: Tensor, real: Tensor | None) -> Int[Tensor, "b n"]:
    """Return the index of the centre with the largest dot product with each key."""
    step = max(1, SCORES // (centres.shape[0] * centres.shape[1]))
    labels = torch.cat([(y @ centres.mT).argmax(-1) for y in x.split(step, 1)], 1)
    return labels if real is None else labels.masked_fill(~real, centres.shape[1])
