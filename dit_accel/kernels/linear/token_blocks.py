"""`TokenBlocks`: loads, maps and stores the tokens of one head by block, a few blocks at a time; and reused memory."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.linear.features import features
from dit_accel.kernels.plan import SparsePlan

# Bytes of the features of a chunk per CPU core, so that they stay in its cache until they are multiplied.
CHUNK_BYTES = 2**19
# Bytes of the features of a chunk on other devices, where few launches matter more than caches.
DEVICE_CHUNK_BYTES = 2**26


class Scratch:
    """Memory that all heads reuse, because first access to new pages costs as much as the products."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor of this shape, in the dtype and on the device of `like`."""
        n = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < n:
            self._kept[name] = like.new_empty(n)
        return self._kept[name][:n].view(shape)


@dataclass(frozen=True)
class TokenBlocks:
    """Layout of the queries or the keys of a plan in blocks."""

    length: int
    block: int
    count: int
    """Number of blocks."""
    dtype: torch.dtype
    """Dtype of loaded tokens."""
    padding: Tensor | None
    """Mask `[B|1, n, block]`, True where there is no token. None: every block is whole."""
    tail_only: bool
    """True if only the last block has padding."""
    chunk_bytes: int
    """Bytes of the features that are computed together."""

    @classmethod
    def of_queries(cls, plan: SparsePlan, dtype: torch.dtype) -> "TokenBlocks":
        """Return the layout of the query blocks."""
        tail_only = plan.q_block_sizes is None
        return cls._make(plan.q_len, plan.block_q, plan.q_sizes()[None], dtype, tail_only)

    @classmethod
    def of_keys(cls, plan: SparsePlan, dtype: torch.dtype) -> "TokenBlocks":
        """Return the layout of the key blocks."""
        tail_only = plan.k_block_sizes is None and plan.kv_lengths is None
        return cls._make(plan.kv_len, plan.block_k, plan.k_sizes(), dtype, tail_only)

    @classmethod
    def _make(
        cls, length: int, block: int, sizes: Tensor, dtype: torch.dtype, tail_only: bool
    ) -> "TokenBlocks":
        count = sizes.shape[-1]
        padding = None
        if not tail_only or length != count * block:
            padding = torch.arange(block, device=sizes.device) >= sizes[..., None]
        on_cpu = sizes.device.type == "cpu"
        size = CHUNK_BYTES * torch.get_num_threads() if on_cpu else DEVICE_CHUNK_BYTES
        return cls(length, block, count, dtype, padding, tail_only, size)

    def chunks(self, width: int, some: slice = slice(0, None)) -> Iterator[slice]:
        """Yield slices of the blocks `some` that fit in a chunk, for tokens of `width` numbers."""
        step = max(1, self.chunk_bytes // (self.block * width * self.dtype.itemsize))
        stop = self.count if some.stop is None else some.stop
        for start in range(some.start, stop, step):
            yield slice(start, min(start + step, stop))

    def padding_of(self, blocks: slice, batch: int = 0) -> Tensor | None:
        """Return the padding mask of some blocks, `[n, block]`, or None if every token exists."""
        if self.padding is None or (self.tail_only and blocks.stop < self.count):
            return None
        return self.padding[batch if len(self.padding) > 1 else 0, blocks]

    def load(self, x: Tensor, blocks: slice, batch: int = 0) -> Tensor:
        """Return some tokens of `x` `[L, D]` as `[n, block, D]`, with zeros in padding, which may hold NaN."""
        rows = self._rows(blocks)
        x = x[rows].to(self.dtype)
        missing = (blocks.stop - blocks.start) * self.block - len(x)
        x = (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(0, (-1, self.block))
        if self.tail_only:
            return x
        padding = self.padding_of(blocks, batch)
        return x if padding is None else x.masked_fill(padding[..., None], 0.0)

    def features(
        self, x: Tensor, blocks: slice, feature_map: str, scratch: Scratch, batch: int = 0
    ) -> Tensor:
        """Return phi of tokens `[L, D]` as `[n, block, D]`, with zeros in padding. Valid until the next call."""
        x = self.load(x, blocks, batch)
        phi = features(x, feature_map, out=scratch.take("features", x, *x.shape))
        padding = self.padding_of(blocks, batch)
        return phi if padding is None else phi.masked_fill_(padding[..., None], 0.0)

    def store(self, out: Tensor, blocks: slice, x: Tensor) -> None:
        """Write `[n, block, D]` to the tokens of `out` `[L, D]`."""
        rows = self._rows(blocks)
        out[rows] = x.flatten(0, 1)[: rows.stop - rows.start]

    def add(self, out: Tensor, blocks: slice, x: Tensor) -> None:
        """Add `[n, block, D]` to the tokens of `out` `[L, D]`."""
        rows = self._rows(blocks)
        out[rows] += x.flatten(0, 1)[: rows.stop - rows.start]

    @contextlib.contextmanager
    def updating(self, out: Tensor, blocks: slice) -> Iterator[Tensor]:
        """Context manager that yields the tokens of `out` `[L, D]` as `[n, block, D]`, to be changed in place."""
        if self._is_view(out, blocks):
            yield out[self._rows(blocks)].unflatten(0, (-1, self.block))
            return
        changed = self.load(out, blocks)
        yield changed
        self.store(out, blocks, changed)

    @contextlib.contextmanager
    def writing(self, out: Tensor, blocks: slice, scratch: Scratch) -> Iterator[Tensor]:
        """Context manager that yields an uninitialised `[n, block, D]`, whose numbers become the tokens of `out` `[L, D]`."""
        if self._is_view(out, blocks):
            yield out[self._rows(blocks)].unflatten(0, (-1, self.block))
            return
        n = blocks.stop - blocks.start
        written = scratch.take("output", self.like(out), n, self.block, out.shape[-1])
        yield written
        self.store(out, blocks, written)

    def like(self, x: Tensor) -> Tensor:
        """Return an empty tensor on the device of `x`, in the dtype of loaded tokens."""
        return x.new_empty(0, dtype=self.dtype)

    def _is_view(self, out: Tensor, blocks: slice) -> bool:
        """Return whether the blocks are a view of `out` `[L, D]`: whole blocks, same dtype, contiguous."""
        whole = blocks.stop * self.block <= self.length
        return whole and out.dtype == self.dtype and out.is_contiguous()

    def _rows(self, blocks: slice) -> slice:
        return slice(blocks.start * self.block, min(blocks.stop * self.block, self.length))
