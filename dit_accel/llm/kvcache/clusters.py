"""`Clusters`: assignment of stored tokens to clusters, with the mean key and value of each cluster."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.spherical_kmeans import sums


@dataclass(frozen=True)
class Clusters:
    """Clusters of the tokens of each batch row and head. Tensors are not changed in place, so copies share them."""

    k: Float[Tensor, "b h m d"]
    """Mean key of each cluster."""
    v: Float[Tensor, "b h m d_v"]
    """Mean value of each cluster."""
    sizes: Int[Tensor, "b h m"]
    """Number of tokens in each cluster."""
    starts: Int[Tensor, "b h m"]
    """Index of the first entry of each cluster in `order`."""
    order: Int[Tensor, "b h n"]
    """Slots of the tokens, sorted by cluster within a run."""
    labels: Int[Tensor, "b h n"]
    """Cluster of each token, counted within its run; the number of clusters of the run for tokens without a cluster."""
    runs: tuple[tuple[int, int], ...]
    """Cumulative numbers of tokens and clusters at the end of each run. A run is a group of tokens clustered together."""

    @staticmethod
    def of(
        k: Tensor, v: Tensor, labels: Int[Tensor, "b h n"], count: int, first: int
    ) -> "Clusters":
        """Return the clusters of one run of tokens.

        Args:
            k, v: exact keys and values.
            labels: cluster of each token; `count` for tokens without a cluster.
            count: number of clusters.
            first: slot of the first token.
        """
        heads, flat = k.shape[:2], labels.flatten(0, 1).long()
        sizes = sums(torch.ones_like(flat, dtype=torch.float)[..., None], flat, count)
        means = [
            (sums(x.float().flatten(0, 1), flat, count) / sizes.clamp(min=1)).to(x.dtype)
            for x in (k, v)
        ]
        ints = sizes[..., 0].to(torch.int32)
        starts = (ints.cumsum(1) - ints + first).to(torch.int32)
        order = (flat.argsort(dim=1, stable=True) + first).to(torch.int32)
        mean_k, mean_v, ints, starts, order = (
            x.unflatten(0, heads) for x in (*means, ints, starts, order)
        )
        runs = ((first + k.shape[2], count),)
        return Clusters(mean_k, mean_v, ints, starts, order, labels.to(torch.int32), runs)

    @property
    def count(self) -> int:
        """Number of clusters, including empty ones."""
        return self.sizes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self._tensors().values())

    def joined(self, other: "Clusters") -> "Clusters":
        """Return these clusters followed by the clusters of later tokens."""
        new = other._tensors()
        tensors = {name: torch.cat([x, new[name]], 2) for name, x in self._tensors().items()}
        later = tuple((tokens, clusters + self.count) for tokens, clusters in other.runs)
        return replace(self, **tensors, runs=self.runs + later)

    def rows(self, index: Int[Tensor, " n"]) -> "Clusters":
        """Return the rows of the batch at `index`, in this order."""
        tensors = {k: x.index_select(0, index.to(x.device)) for k, x in self._tensors().items()}
        return replace(self, **tensors)

    def whole_runs(self, tokens: int) -> "Clusters | None":
        """Return the runs that end within the first `tokens` tokens; None if there is no such run."""
        runs = tuple(x for x in self.runs if x[0] <= tokens)
        if not runs:
            return None
        end, count = runs[-1]
        return Clusters(
            self.k[:, :, :count],
            self.v[:, :, :count],
            self.sizes[:, :, :count],
            self.starts[:, :, :count],
            self.order[:, :, :end],
            self.labels[:, :, :end],
            runs,
        )

    def members(
        self, clusters: Int[Tensor, "b h l_q r"]
    ) -> tuple[Int[Tensor, "b h l_q n"], Bool[Tensor, "b h l_q n"], Int[Tensor, "b h l_q"]]:
        """Return the token slots in the selected clusters of each query position, the mask of real entries, and their number."""
        shape = clusters.shape
        sizes, starts = (
            x.long().gather(2, clusters.flatten(2)).view(shape) for x in (self.sizes, self.starts)
        )
        ends = sizes.cumsum(-1)
        counts = sizes.sum(-1)
        most = int(counts.max())
        at = torch.arange(most, device=clusters.device).expand(*shape[:3], most).contiguous()
        which = torch.searchsorted(ends, at, right=True).clamp(max=shape[3] - 1)
        place = (starts - ends + sizes).gather(3, which) + at
        inside = at < counts[..., None]
        place = place.masked_fill(~inside, 0).flatten(2)
        index = self.order.gather(2, place).long().view(*shape[:3], most)
        return index, inside, counts

    def _tensors(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
