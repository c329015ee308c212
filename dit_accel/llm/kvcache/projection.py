"""Graphs that link keys which answer the same queries (RetrievalAttention, arXiv 2409.10516), and the search in them."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.partial import SCORES

ENTRIES = 32
"""Keys that each search starts from."""
LINKED = 2
"""Keys that a query links, over the neighbours of a key."""
LEAF = 512
"""Keys among which near ones are looked for, at most."""
TREES = 2
"""Ways of dividing the keys into leaves."""
EXPANDED = 4
"""Keys whose neighbours a search compares at a time."""


def projected_graph(
    queries: Float[Tensor, "m d"], keys: Float[Tensor, "n d"], degree: int
) -> tuple[Int[Tensor, "n r"], Int[Tensor, " e"]]:
    """Return the neighbours of each key, and the keys to start from.

    Queries of a model lie far from its keys, so that a graph of near keys leads a search astray. Here each query links
    the key with the largest dot product to the next ones, and each of them to the one after it. Links that more queries
    make come first. A quarter of the links is for near keys, in both directions, so that a search also reaches keys that
    no query asked for. It starts from the keys that most queries rank first.

    Args:
        queries: queries.
        keys: keys, more than `degree + 1`.
        degree: neighbours of each key.
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
    """Return keys near each key, nearest first, itself included.

    Each level of a tree divides the keys in halves along a random direction, so that near keys mostly end in the same
    leaf. Only the keys of a leaf are compared with each other.

    Args:
        keys: keys.
        count: keys to return for each.
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
    """Return the keys that most queries link to each key, -1 where there are fewer."""
    pivot = best[:, :1].expand(-1, best.shape[1] - 1)
    first = torch.cat([pivot, best[:, :-1]], 1).flatten()
    second = torch.cat([best[:, 1:], best[:, 1:]], 1).flatten()
    both = torch.cat([first, second]) * n + torch.cat([second, first])
    links, times = both.unique(return_counts=True)
    return _table(links[times.argsort(descending=True, stable=True)], n, degree)


def _both_ways(
    near: Int[Tensor, "n m"], shared: Int[Tensor, "n r"], degree: int
) -> Int[Tensor, "n s"]:
    """Return links to near keys and back, -1 where there are fewer; those to keys with few links come first."""
    n = len(near)
    own = torch.arange(n, device=near.device)[:, None].expand_as(near).flatten()
    links = torch.cat([own * n + near.flatten(), near.flatten() * n + own]).unique()
    known = torch.cat([shared[shared >= 0], near.flatten()]).bincount(minlength=n)
    return _table(links[known[links % n].argsort(stable=True)], n, degree)


def _table(links: Int[Tensor, " e"], n: int, degree: int) -> Int[Tensor, "n r"]:
    """Return the first links `source * n + target` of each key as a table of targets; -1 is none."""
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
    """Return keys with large dot products, best first, their products, and the number of products computed.

    A search keeps the best `width` keys. It goes on from the best of them whose neighbours it has not seen, until there
    is none.

    Args:
        q: queries.
        keys: keys.
        graph: neighbours of each key.
        entries: keys to start from.
        width: keys that are kept, at most all.
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
    """Return which of the sorted neighbours were not seen before, each once; -1 is none."""
    again = torch.zeros_like(near, dtype=torch.bool)
    again[:, 1:] = near[:, 1:] == near[:, :-1]
    return (near >= 0) & ~again & ~seen.gather(1, near.clamp(min=0))
