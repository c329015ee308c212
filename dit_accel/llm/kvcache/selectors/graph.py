"""`Retrieval`: queries read the keys with the largest scores, found by an index (RetrievalAttention, arXiv 2409.10516)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.budget import check_budget, check_count, tokens_of
from dit_accel.llm.kvcache.chosen import attend_chosen
from dit_accel.llm.kvcache.graphs import LEAST, KeyIndex, check_faiss, index_of
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import SCORES, Partial
from dit_accel.llm.kvcache.selector import PromptQueries, Selector
from dit_accel.llm.kvcache.store import Store

CHUNK = 4096
"""Number of keys that are compared at a time."""
INDEXES = ("flat", "graph", "hnsw", "nsg")
SAMPLES = 4096
"""Largest number of prompt queries that a graph is built from."""


@dataclass
class Retrieval(Selector):
    """Selector that reads the tokens with the largest dot products, separately for each query head.

    A graph covers the tokens of the prompt. Later tokens are searched exhaustively. When their number reaches both `rebuild`
    and the size of the graph, the graph is rebuilt. A crop into the tokens of the graph drops the graph, and all tokens are
    searched exhaustively until the next rebuild.
    """

    name: ClassVar[str] = "retrieval"
    settled: ClassVar[frozenset[str]] = frozenset({"graphs", "built"})
    index: str = "flat"
    """Kind of index: "flat" compares all keys; "graph" searches a graph built from the queries of the prompt, as in the paper.

    A graph search compares few keys, which helps if the keys are in slow memory; otherwise "flat" is faster. "hnsw" and
    "nsg" are graphs of faiss for comparison; they find fewer of the best keys if queries and keys are distributed differently.
    """
    topk: float | int = 128
    """Tokens that a query head reads: a number (int), or a share (float) of the stored tokens."""
    degree: int = 32
    """Number of neighbours of each key in a graph."""
    width: int = 128
    """Number of candidates in a graph search; raised to the number of tokens to read if that is larger."""
    rebuild: int = 4096
    """Smallest number of tokens outside the graph that triggers a rebuild."""
    scanned: float | None = field(default=None, init=False, repr=False)
    """Share of the keys that the last call compared with each query; None if the index does not count comparisons."""
    built: int = field(default=0, init=False, repr=False)
    """Number of slots that the graphs cover."""
    graphs: list[list[KeyIndex]] = field(default_factory=list, init=False, repr=False)
    """Index of each batch row and head."""
    queries: Float[Tensor, "b h m d"] | None = field(default=None, init=False, repr=False)
    """PromptQueries queries from which the graphs are built."""

    def __post_init__(self) -> None:
        if self.index not in INDEXES:
            raise ValueError(f"index={self.index!r}: must be one of {', '.join(INDEXES)}")
        check_budget("topk", self.topk)
        check_count("degree", self.degree, 4)
        if self.degree > LEAST // 2:
            raise ValueError(f"degree={self.degree}: must be an int in [4, {LEAST // 2}]")
        check_count("width", self.width)
        check_count("rebuild", self.rebuild, LEAST)
        if self.index in ("hnsw", "nsg"):
            check_faiss(self.index)

    def append(self, store: Store, part: Part, prompt: PromptQueries | None, scale: float) -> None:
        store.append(part)
        if self.index == "flat":
            return
        if prompt is not None and self.index != "hnsw":
            q = prompt.q.flatten(2, 3)
            step = -(-q.shape[2] // SAMPLES)
            self.queries = q[:, :, ::step].contiguous()
        later = store.slots - self.built
        if (prompt is not None and later >= LEAST) or later >= max(self.rebuild, self.built):
            self._build(store)

    def restored(self, store: Store) -> None:
        if self.index != "flat" and store.slots >= LEAST:
            self._build(store)

    def _build(self, store: Store) -> None:
        keys, real = torch.cat(list(_keys(store, 0)), 2), store.visible()
        self.graphs, self.built = [], store.slots
        for row in range(keys.shape[0]):
            each = []
            for head in range(keys.shape[1]):
                slots = torch.arange(self.built, device=keys.device)
                if real is not None:
                    slots = slots[real[row, head % real.shape[1]]]
                shape = None if self.queries is None else self.queries[row, head]
                own = keys[row, head, slots]
                each.append(index_of(self.index, own, slots, shape, self.degree))
            self.graphs.append(each)

    def attend(self, store: Store, q: Tensor, scale: float) -> tuple[list[Partial], float]:
        count = tokens_of(self.topk, store.slots)
        if self.reads_all(count, store.slots):
            return [store.attend(q, scale)], 1.0
        rows, heads, group, length, _ = q.shape
        found, compared = [], []
        step = max(1, SCORES // (rows * heads * max(CHUNK, count)))
        for some in q.flatten(2, 3).split(step, 2):
            index, scores, share = self._search(store, some, count, scale)
            visible = scores > -math.inf
            found.append(attend_chosen(store, some[:, :, None], index, visible, scale))
            compared += [share] * some.shape[2]
        known = [x for x in compared if x is not None]
        self.scanned = sum(known) / len(known) if len(known) == len(compared) else None
        o, lse = torch.cat([x.o for x in found], 3), torch.cat([x.lse for x in found], 3)
        o, lse = (x[:, :, 0].unflatten(2, (group, length)) for x in (o, lse))
        return [Partial(o, lse)], count / store.slots

    @staticmethod
    def reads_all(count: int, total: int) -> bool:
        """Return whether the budget covers all tokens, so that selection can be skipped."""
        return count >= total

    def _search(
        self, store: Store, q: Float[Tensor, "b h l d"], count: int, scale: float
    ) -> tuple[Int[Tensor, "b h l n"], Float[Tensor, "b h l n"], float | None]:
        """Return slots, scores (-inf if too few were found), and the share of the keys that were compared."""
        index, scores, compared = self._in_graphs(q, count)
        scores, at, real = scores * scale, self.built, store.visible()
        for k in _keys(store, self.built):
            new = (q @ k.mT).float() * scale
            slots = torch.arange(at, at + k.shape[2], device=q.device)
            if real is not None:
                new = new.masked_fill(~real[:, :, None, slots], -math.inf)
            scores = torch.cat([scores, new], -1)
            index = torch.cat([index, slots.expand_as(new)], -1)
            scores, best = scores.topk(min(count, scores.shape[-1]), -1)
            index, at = index.gather(-1, best), at + k.shape[2]
        if compared is not None:
            compared = (compared * self.built + store.slots - self.built) / store.slots
        return index, scores, compared

    def _in_graphs(
        self, q: Float[Tensor, "b h l d"], count: int
    ) -> tuple[Int[Tensor, "b h l n"], Float[Tensor, "b h l n"], float | None]:
        """Return slots, dot products, and the share of compared keys from a search in the graphs."""
        count = min(count, self.built)
        index = torch.zeros(*q.shape[:3], count, dtype=torch.long, device=q.device)
        scores = torch.full(index.shape, -math.inf, device=q.device)
        shares = []
        for row, each in enumerate(self.graphs):
            for head, graph in enumerate(each):
                slots, products, share = graph.search(q[row, head], count, self.width)
                index[row, head, :, : slots.shape[1]] = slots
                scores[row, head, :, : slots.shape[1]] = products
                shares.append(share)
        known = [x for x in shares if x is not None]
        unknown = len(known) < len(shares)
        return index, scores, None if unknown else sum(known) / max(1, len(known))

    def crop(self, store: Store, count: int) -> Part | None:
        rest = store.crop(count)
        if store.slots < self.built:
            self.graphs, self.built = [], 0
        return rest

    def rows(self, index: Int[Tensor, " n"]) -> None:
        if self.graphs:
            self.graphs = [self.graphs[i] for i in index.tolist()]
        if self.queries is not None:
            self.queries = self.queries.index_select(0, index.to(self.queries.device))

    def clear(self) -> None:
        self.graphs, self.built, self.queries, self.scanned = [], 0, None, None

    @property
    def nbytes(self) -> int:
        found = sum(graph.nbytes for each in self.graphs for graph in each)
        return found + (0 if self.queries is None else self.queries.nbytes)


def _keys(store: Store, start: int) -> Iterator[Float[Tensor, "b h n d"]]:
    """Yield the decoded keys from slot `start` on, in chunks."""
    step = max(1, CHUNK // store.granule) * store.granule
    for at in range(start, store.slots, step):
        yield store.decode(store.cut(at, min(at + step, store.slots)).tensors)[0]
