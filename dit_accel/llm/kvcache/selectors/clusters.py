"""`Wave`: queries read the best clusters of keys exactly and estimate others from their means (RetroInfer, arXiv
2505.02922)."""

import math
from copy import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.blocks import BlockCache
from dit_accel.llm.kvcache.budget import check_count, check_share
from dit_accel.llm.kvcache.chosen import attend_chosen
from dit_accel.llm.kvcache.clusters import Clusters
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import SCORES, Partial, from_scores, merged_part
from dit_accel.llm.kvcache.selector import PromptQueries, Selector
from dit_accel.llm.kvcache.spherical_kmeans import cluster_keys
from dit_accel.llm.kvcache.store import Store


@dataclass
class Wave(Selector):
    """Selector that reads the clusters with the best mean keys, estimates the next best ones, and skips the rest.

    The prompt is clustered first, then every `flush` new tokens. The estimate of a cluster assumes that all of its tokens
    have the mean key and the mean value, so its weight is at most the true weight (Jensen's inequality).
    """

    name: ClassVar[str] = "wave"
    settled: ClassVar[frozenset[str]] = frozenset({"blocks"})
    retrieve: float = 0.05
    """Share of the clusters whose tokens are read."""
    least: int = 0
    """Smallest number of clusters to read if `retrieve` > 0, because a small share of a short context is too few tokens."""
    estimate: float = 0.23
    """Share of the clusters that are estimated."""
    size: int = 16
    """Mean number of tokens per cluster."""
    segment: int = 8192
    """Number of tokens that are clustered together."""
    rounds: int = 10
    """Number of k-means rounds."""
    cached: float = 0.0
    """Share of the clusters that stay in an LRU cache on the device during decoding, for stores in slower memory."""
    blocks: BlockCache = field(default_factory=BlockCache, init=False, repr=False)
    """LRU cache of clusters. Its `hits` and `misses` count the reads of decoding calls."""
    clusters: Clusters | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_share("retrieve", self.retrieve)
        check_share("estimate", self.estimate)
        check_share("cached", self.cached)
        if not self.retrieve and not self.estimate:
            raise ValueError("retrieve=0, estimate=0: must not both be 0")
        check_count("least", self.least, 0)
        for name in ("size", "segment", "rounds"):
            check_count(name, getattr(self, name))

    def append(self, store: Store, part: Part, prompt: PromptQueries | None, scale: float) -> None:
        first = store.slots
        store.append(part)
        labels, count = cluster_keys(
            part.k, part.valid, size=self.size, segment=self.segment, rounds=self.rounds
        )
        new = Clusters.of(part.k, part.v, labels, count, first)
        self.clusters = new if self.clusters is None else self.clusters.joined(new)

    def attend(self, store: Store, q: Tensor, scale: float) -> tuple[list[Partial], float]:
        clusters = self.clusters
        assert clusters is not None
        read = self._count(self.retrieve, clusters.count)
        read = max(read, min(self.least, clusters.count)) if read else 0
        if self.reads_all(read, clusters.count):
            return [store.attend(q, scale)], 1.0
        guess = min(self._count(self.estimate, clusters.count), clusters.count - read)
        rows, heads, group, length, _ = q.shape
        most = max(group * clusters.count, 2 * read * self.size)
        found, counts = [], []
        for some in q.split(max(1, SCORES // (rows * heads * most)), 3):
            best, parts = self._zones(some, read, guess, scale)
            if read and self.cached and length == 1:
                most = math.ceil(self.cached * clusters.count) * rows * heads
                parts.append(self.blocks.attend(store, clusters, best, some, scale, most))
                count = clusters.sizes.gather(2, best[:, :, 0]).sum(-1, keepdim=True)
            else:
                index, inside, count = clusters.members(best)
                if read:
                    parts.append(attend_chosen(store, some, index, inside, scale))
            found.append(merged_part(parts))
            counts.append(count)
        o, lse = torch.cat([x.o for x in found], 3), torch.cat([x.lse for x in found], 3)
        return [Partial(o, lse)], float(torch.cat(counts, 2).double().mean()) / store.slots

    @staticmethod
    def reads_all(count: int, total: int) -> bool:
        """Return whether a query reads all clusters, so that selection can be skipped."""
        return count >= total

    @staticmethod
    def _count(share: float, total: int) -> int:
        return max(1, round(share * total)) if share else 0

    def _zones(
        self, q: Float[Tensor, "b h g l_q d"], read: int, guess: int, scale: float
    ) -> tuple[Int[Tensor, "b h l_q r"], list[Partial]]:
        """Return the clusters that each query position reads, and the estimated attention over the next best clusters."""
        clusters = self.clusters
        assert clusters is not None
        empty = (clusters.sizes == 0)[:, :, None]  # [B, H, 1, m]
        scores = (q.flatten(2, 3) @ clusters.k.mT).unflatten(2, q.shape[2:4]).float() * scale
        hidden = scores.masked_fill(empty[:, :, None], torch.finfo(scores.dtype).min)
        weights = hidden.softmax(-1).sum(2).masked_fill(empty, -1.0)
        order = weights.topk(read + guess, dim=-1).indices
        estimated = torch.zeros_like(weights, dtype=torch.bool)
        estimated = estimated.scatter(-1, order[..., read:], True)
        sizes = clusters.sizes.float().log()[:, :, None, None]  # -inf where a cluster is empty
        scores = (scores + sizes).masked_fill(~estimated[:, :, None], -math.inf)
        return order[..., :read], [from_scores(scores, clusters.v)]

    def crop(self, store: Store, count: int) -> Part | None:
        rest = store.crop(count)
        clusters, slots = self.clusters, store.slots
        if clusters is None or clusters.runs[-1][0] == slots:
            return rest
        kept = clusters.whole_runs(slots)
        first, before = (0, 0) if kept is None else kept.runs[-1]
        if slots > first:  # the crop cut a run: recompute the means of its remaining tokens
            total = next(x[1] for x in clusters.runs if x[0] > slots) - before
            k, v = store.decode(store.cut(first, slots).tensors)
            new = Clusters.of(k, v, clusters.labels[:, :, first:slots], total, first)
            kept = new if kept is None else kept.joined(new)
        self.clusters = kept
        self.blocks.blocks.clear()
        return rest

    def fork(self) -> "Wave":
        found = copy(self)
        found.blocks = self.blocks.fork()
        return found

    def rows(self, index: Int[Tensor, " n"]) -> None:
        if self.clusters is not None:
            self.clusters = self.clusters.rows(index)
            self.blocks.blocks.clear()

    def clear(self) -> None:
        self.clusters, self.blocks = None, BlockCache()

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + (0 if self.clusters is None else self.clusters.nbytes)
