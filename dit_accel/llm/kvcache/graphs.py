"""Maximum-inner-product indexes over keys: one index for each batch row and head."""

import importlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.chosen import GATHERED
from dit_accel.llm.kvcache.projection import EXPANDED, projected_graph, search_graph

LEAST = 256
"""Smallest number of keys for which a graph is built. Fewer keys are searched exhaustively."""
SEEN = 2**26
"""Largest number of visited marks in memory during a graph search: 64 MiB."""


def check_faiss(index: str) -> None:
    """Check that faiss can be imported.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        _faiss()
    except ImportError:
        raise ValueError(
            f"index={index!r}: needs the package faiss (pip install faiss-cpu); must be flat or graph without it"
        ) from None


class KeyIndex:
    """Exhaustive index, which compares a query with all keys. An index is not changed after creation, so copies share it.

    Args:
        keys: keys.
        slots: slot of each key in the store.
    """

    def __init__(self, keys: Float[Tensor, "n d"], slots: Int[Tensor, " n"]) -> None:
        self.keys, self.slots = keys.float(), slots

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return self.keys.nbytes + self.slots.nbytes

    def search(
        self, q: Float[Tensor, "l d"], count: int, width: int
    ) -> tuple[Int[Tensor, "l n"], Float[Tensor, "l n"], float | None]:
        """Return slots, dot products (-inf if the index found too few), and the share of the keys that were compared.

        Args:
            q: queries.
            count: number of keys to find for each query.
            width: number of candidates that a graph search keeps.
        """
        count = min(count, len(self.keys))
        found, products, compared = self._find(
            q.float(), count, min(max(width, count), len(self.keys))
        )
        return self.slots[found], products, compared

    def _find(self, q: Tensor, count: int, width: int) -> tuple[Tensor, Tensor, float | None]:
        products, found = (q @ self.keys.mT).topk(count, 1)
        return found, products, 1.0


class LinkedKeys(KeyIndex):
    """Graph index that links keys with high scores for the same queries, see `projected_graph`.

    Args:
        keys, slots: see `KeyIndex`.
        queries: sample queries, from the same distribution as later queries.
        degree: number of neighbours of each key.
    """

    def __init__(self, keys: Tensor, slots: Tensor, queries: Tensor, degree: int) -> None:
        super().__init__(keys, slots)
        graph, self.entries = projected_graph(queries, self.keys, degree)
        self.graph = graph.to(torch.int32)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.graph.nbytes

    def _find(self, q: Tensor, count: int, width: int) -> tuple[Tensor, Tensor, float | None]:
        n, dim = self.keys.shape
        step = max(1, min(SEEN // n, GATHERED // (EXPANDED * self.graph.shape[1] * dim)))
        ids = torch.zeros(len(q), count, dtype=torch.long, device=q.device)
        scores, compared = torch.full(ids.shape, -torch.inf, device=q.device), 0
        for start in range(0, len(q), step):
            at = slice(start, start + step)
            found, products, times = search_graph(q[at], self.keys, self.graph, self.entries, width)
            few, compared = min(count, found.shape[1]), compared + times
            ids[at, :few], scores[at, :few] = found[:, :few], products[:, :few]
        return ids, scores, compared / (len(q) * n)


class FaissKeys(KeyIndex):
    """Graph index of faiss, on the CPU.

    Args:
        kind: "hnsw" links near keys; "nsg" starts from the links of `LinkedKeys`, most of which faiss prunes.
        keys, slots, queries, degree: see `LinkedKeys`.
    """

    def __init__(
        self, kind: str, keys: Tensor, slots: Tensor, queries: Tensor, degree: int
    ) -> None:
        faiss = _faiss()
        super().__init__(keys, slots)
        x, metric = self.keys.cpu().numpy(), faiss.METRIC_INNER_PRODUCT
        self.kind, self.links = kind, 4 * degree * len(keys)
        self.index: Any
        if kind == "nsg":
            self.index = faiss.IndexNSGFlat(keys.shape[1], degree, metric)
            self.index.build(x, projected_graph(queries, self.keys, degree)[0].cpu().numpy())
        else:
            self.index = faiss.IndexHNSWFlat(keys.shape[1], degree // 2, metric)
            self.index.add(x)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.links

    def _find(self, q: Tensor, count: int, width: int) -> tuple[Tensor, Tensor, float | None]:
        faiss = _faiss()
        if self.kind == "nsg":
            self.index.nsg.search_L = width
        else:
            self.index.hnsw.efSearch = width
            faiss.cvar.hnsw_stats.reset()
        products, found = map(torch.from_numpy, self.index.search(q.cpu().numpy(), count))
        compared = None  # faiss does not count comparisons for NSG
        if self.kind == "hnsw":
            compared = faiss.cvar.hnsw_stats.ndis / (len(q) * len(self.keys))
        products = products.masked_fill(found < 0, -torch.inf)
        return found.clamp(min=0).to(q.device), products.to(q.device), compared


def _faiss() -> Any:
    return importlib.import_module("faiss")


def index_of(
    kind: str, keys: Tensor, slots: Tensor, queries: Tensor | None, degree: int
) -> KeyIndex:
    """Return an index over keys of the kind "graph", "hnsw" or "nsg"; an exhaustive index if there are few keys."""
    if len(keys) < LEAST:
        return KeyIndex(keys, slots)
    queries = keys if queries is None else queries
    if kind == "graph":
        return LinkedKeys(keys, slots, queries, degree)
    return FaissKeys(kind, keys, slots, queries, degree)
