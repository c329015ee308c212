"""Key graphs built from sample queries (RetrievalAttention, arXiv 2409.10516), and search in these graphs."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.partial import SCORES

ENTRIES = 32
"""Number of keys from which each search starts."""
LINKED = 2
"""Number of best keys that a query links, as a multiple of `degree`."""
LEAF = 512
"""Largest number of keys in a leaf of a random-projection tree."""
TREES = 2
"""Number of random-projection trees."""
EXPANDED = 4
"""Number of keys that a search expands per step."""


def projected_graph(
    queries: Float[Tensor, "m d"], keys: Float[Tensor, "n d"], degree: int
) -> tuple[Int[Tensor, "n r"], Int[Tensor, " e"]]:
    """Return the neighbours of each key, and the entry keys of a search.

    The queries of a model are far from its keys, so a nearest-neighbour graph of the keys misleads a search. Here each
    sample query sorts its best keys by dot product, and links the best key to the others and each key to the next one.
    Links made by more queries are preferred. A quarter of the links connect near keys, in both directions, so that a search
    can also reach keys that no sample query ranked high. The entry keys are those that most queries rank first.

    Args:
        queries: sample queries.
        keys: keys, more than `degree + 1`.
        degree: number of neighbours of each key.
    """
    queries, keys, n = queries.float(), keys.float(), len(keys)
    step = max(1, SCORES // n)
    linked = min(LINKED * degree, n)
    best = torch.cat([(x @ keys.mT).topk(linked, -1).indices for x in queries.split(step)])
    near = near_keys(keys, degree + 1)
    shared = _most_shared(best, n, degree - degree // 4)
    every = torch.cat([shared, _both_ways(near[:, 1 : 1 + degree // 8], shared, degree), near], 1)
    own = torch.arange(n, device=keys.device)[:, None]
    taken = (every < 0) | (every == own)
    for i in range(1, every.shape[1]):
        taken[:, i] |= (every[:, :i] == every[:, i : i + 1]).any(1)
    graph = every.gather(1, taken.long().argsort(dim=1, stable=True)[:, :degree])
    return graph, best[:, 0].bincount(minlength=n).topk(min(ENTRIES, n)).indices


def near_keys(keys: Float[Tensor, "n d"], count: int) -> Int[Tensor, "n r"]:
    """Return approximate nearest neighbours of each key, nearest first, including the key itself.

    Each level of a random-projection tree splits the keys in halves along a random direction. Only the keys of the same
    leaf are compared with each other.

    Args:
        keys: keys.
        count: number of neighbours to return for each key.
    """
    n, generator = len(keys), torch.Generator(keys.device).manual_seed(0)
    levels = max(0, math.ceil(math.log2(n / LEAF)))
    size = -(-n // 2**levels)
    found, distances = [], []
    for _ in range(TREES if levels else 1):
        ids = torch.arange(size * 2**levels, device=keys.device) % n
        for level in range(levels):
            halves = ids.view(2**level, -1)
            shape = (2**level, keys.shape[1], 1)
            direction = torch.randn(shape, generator=generator, device=keys.device)
            along = (keys[halves] @ direction)[..., 0]
            ids = halves.gather(1, along.argsort(1)).flatten()
        leaves = ids.view(2**levels, size)
        near = torch.empty(n, min(count, size), dtype=torch.long, device=keys.device)
        distance = torch.empty(near.shape, device=keys.device)
        for own in leaves.split(max(1, SCORES // size**2)):
            x = keys[own]
            nearest = torch.cdist(x, x).topk(near.shape[1], largest=False)
            at = own[:, None].expand(-1, size, -1).gather(2, nearest.indices)
            near[own.flatten()], distance[own.flatten()] = (
                at.flatten(0, 1),
                nearest.values.flatten(0, 1),
            )
        found.append(near)
        distances.append(distance)
    ids, order = torch.cat(found, 1).sort(1)
    far = torch.cat(distances, 1).gather(1, order)
    far[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], torch.inf)
    return ids.gather(1, far.argsort(1)[:, :count])


def _most_shared(best: Int[Tensor, "m k"], n: int, degree: int) -> Int[Tensor, "n r"]:
    """Return for each key the keys to which most queries link it, padded with -1."""
    pivot = best[:, :1].expand(-1, best.shape[1] - 1)
    first = torch.cat([pivot, best[:, :-1]], 1).flatten()
    second = torch.cat([best[:, 1:], best[:, 1:]], 1).flatten()
    both = torch.cat([first, second]) * n + torch.cat([second, first])
    links, times = both.unique(return_counts=True)
    return _table(links[times.argsort(descending=True, stable=True)], n, degree)


def _both_ways(
    near: Int[Tensor, "n m"], shared: Int[Tensor, "n r"], degree: int
) -> Int[Tensor, "n s"]:
    """Return links between near keys in both directions, padded with -1. Links to keys with few other links come first."""
    n = len(near)
    own = torch.arange(n, device=near.device)[:, None].expand_as(near).flatten()
    links = torch.cat([own * n + near.flatten(), near.flatten() * n + own]).unique()
    known = torch.cat([shared[shared >= 0], near.flatten()]).bincount(minlength=n)
    return _table(links[known[links % n].argsort(stable=True)], n, degree)


def _table(links: Int[Tensor, " e"], n: int, degree: int) -> Int[Tensor, "n r"]:
    """Return the first `degree` links (`source * n + target`) of each key as a table of targets, padded with -1."""
    links = links[(links // n).argsort(stable=True)]
    source = links // n
    rank = torch.arange(len(links), device=links.device) - torch.searchsorted(source, source)
    few = rank < degree
    table = torch.full((n, degree), -1, device=links.device)
    table[source[few], rank[few]] = links[few] % n
    return table


def search_graph(
    q: Float[Tensor, "l d"],
    keys: Float[Tensor, "n d"],
    graph: Int[Tensor, "n r"],
    entries: Int[Tensor, " e"],
    width: int,
) -> tuple[Int[Tensor, "l w"], Float[Tensor, "l w"], int]:
    """Return keys with large dot products (best first), their dot products, and the number of dot products computed.

    The search keeps the best `width` keys found so far. It repeatedly expands the best of them that are not expanded yet,
    until all are.

    Args:
        q: queries.
        keys: keys.
        graph: neighbours of each key.
        entries: keys from which the search starts.
        width: number of keys to keep, at most all.
    """
    ids = entries.expand(len(q), -1)
    seen = torch.zeros(len(q), len(keys), dtype=torch.bool, device=q.device)
    seen.scatter_(1, ids, True)
    scores, compared = q @ keys[entries].mT, ids.numel()
    waiting = torch.ones_like(scores, dtype=torch.bool)
    while True:
        best, at = scores.masked_fill(~waiting, -torch.inf).topk(min(EXPANDED, scores.shape[1]), 1)
        more = best > -torch.inf
        if not more.any():
            break
        waiting = waiting.scatter(1, at, False)
        near = graph[ids.gather(1, at)].masked_fill(~more[..., None], -1).flatten(1)
        near = near.sort(1).values
        new = _new(near, seen)
        row, column = new.nonzero(as_tuple=True)
        near = near.clamp(min=0)
        seen[row, near[row, column]] = True
        products = (keys[near] @ q[..., None])[..., 0].masked_fill(~new, -torch.inf)
        compared += len(row)
        ids, scores = torch.cat([ids, near], 1), torch.cat([scores, products], 1)
        scores, kept = scores.topk(min(width, scores.shape[1]), 1)
        ids, waiting = ids.gather(1, kept), torch.cat([waiting, new], 1).gather(1, kept)
    return ids, scores, compared


def _new(near: Int[Tensor, "l m"], seen: Bool[Tensor, "l n"]) -> Bool[Tensor, "l m"]:
    """Return the mask of sorted neighbours that were not seen before, without duplicates and padding (-1)."""
    again = torch.zeros_like(near, dtype=torch.bool)
    again[:, 1:] = near[:, 1:] == near[:, :-1]
    return (near >= 0) & ~again & ~seen.gather(1, near.clamp(min=0))
