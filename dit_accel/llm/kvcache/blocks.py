"""`BlockCache`: LRU cache of clusters on the device (the block cache of RetroInfer, arXiv 2505.02922)."""

from collections import OrderedDict
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.clusters import Clusters
from dit_accel.llm.kvcache.partial import Partial, by_query
from dit_accel.llm.kvcache.store import Store

Place = tuple[int, int, int]
"""Batch row, head and cluster."""
Block = dict[str, Tensor]
"""Encoded tokens `[tokens, ...]` of a cluster."""


@dataclass
class BlockCache:
    """LRU cache of the encoded tokens of clusters."""

    blocks: OrderedDict[Place, Block] = field(default_factory=OrderedDict)
    hits: int = 0
    """Number of clusters read from this cache."""
    misses: int = 0
    """Number of clusters read from the store."""

    def attend(
        self,
        store: Store,
        clusters: Clusters,
        best: Int[Tensor, "b h 1 r"],
        q: Float[Tensor, "b h g 1 d"],
        scale: float,
        capacity: int,
    ) -> Partial:
        """Return the attention of one query position over its selected clusters.

        Args:
            store: store that holds the tokens.
            clusters: clusters of the tokens.
            best: indices of the clusters to read.
            q: queries, grouped by KV head.
            scale: factor of the dot products.
            capacity: maximum number of cached clusters over all rows and heads.
        """
        rows, heads = best.shape[:2]
        sizes = clusters.sizes.gather(2, best[:, :, 0]).tolist()
        chosen = best[:, :, 0].tolist()
        wanted = [
            [(b, h, c) for c, size in zip(chosen[b][h], sizes[b][h], strict=True) if size]
            for b in range(rows)
            for h in range(heads)
        ]
        found = self._read(store, clusters, wanted, capacity)
        counts = clusters.sizes.gather(2, best[:, :, 0]).sum(-1)[..., None, None]
        if (stored := store.stored_heads()) is not None:
            counts = counts * stored.to(q.device)[:, None, None]
        most = int(counts.max())
        slots = torch.arange(most, device=q.device)
        tensors = {}
        for name, x in store.cut(0, store.granule).tensors.items():
            held = _held(store, name, heads)
            padded = x.new_zeros(rows, len(held), most, *x.shape[3:])
            for b in range(rows):
                for i, h in enumerate(held):
                    if each := wanted[b * heads + h]:
                        flat = torch.cat([found[place][name] for place in each])[:most]
                        padded[b, i, : len(flat)] = flat
            tensors[name] = padded
        k, v = store.decode(tensors)
        return by_query(q, k[:, :, None], v[:, :, None], scale=scale, visible=slots < counts)

    def _read(
        self, store: Store, clusters: Clusters, wanted: list[list[Place]], capacity: int
    ) -> dict[Place, Block]:
        """Return the tokens of the wanted clusters and update the LRU cache."""
        missing = [[x for x in each if x not in self.blocks] for each in wanted]
        new = _fetched(store, clusters, missing)
        found = {}
        for each in wanted:
            for place in each:
                if place in new:
                    found[place] = new[place]
                else:
                    found[place] = self.blocks[place]
                    self.blocks.move_to_end(place)
        self.misses += len(new)
        self.hits += len(found) - len(new)
        self.blocks.update(new)
        while len(self.blocks) > capacity:
            self.blocks.popitem(last=False)
        return found

    def fork(self) -> "BlockCache":
        """Return a copy that shares the cached tensors."""
        return replace(self, blocks=OrderedDict(self.blocks))

    @property
    def nbytes(self) -> int:
        """Bytes of the cached tokens."""
        return sum(x.nbytes for block in self.blocks.values() for x in block.values())


def _fetched(store: Store, clusters: Clusters, missing: list[list[Place]]) -> dict[Place, Block]:
    """Read clusters from the store at once. `missing` holds a list of clusters for each row and head."""
    if not any(missing):
        return {}
    rows, heads = clusters.sizes.shape[:2]
    order, places, index = clusters.order.flatten(0, 1), [], []
    for i, each in enumerate(missing):
        at, slots = 0, []
        for place in each:
            start, size = (int(x[place]) for x in (clusters.starts, clusters.sizes))
            slots.append(order[i, start : start + size])
            places.append((place, at, at + size))
            at += size
        index.append(torch.cat(slots) if slots else order[i, :0])
    padded = torch.nn.utils.rnn.pad_sequence(index, batch_first=True).long()
    taken = store.take(padded.unflatten(0, (rows, heads))).tensors
    held = {name: _held(store, name, heads) for name in taken}
    return {
        place: {
            name: x[place[0], held[name].index(place[1]), start:stop].clone()
            for name, x in taken.items()
            if place[1] in held[name]
        }
        for place, start, stop in places
    }


def _held(store: Store, name: str, heads: int) -> list[int]:
    """Return the heads that the tensor `name` of a store contains."""
    found = store.heads_of(name)
    return list(range(heads)) if found is None else found.tolist()
