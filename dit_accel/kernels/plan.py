"""`SparsePlan`: which key blocks each query block reads, as plain data."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.kernels.lists import block_lists, block_mask


@dataclass(frozen=True, eq=False, kw_only=True)
class SparsePlan:
    """Which key blocks every query block reads exactly; int32 tensors and a few numbers.

    The two lists of a row are disjoint. A block on the *full* list needs no element mask: every
    key in it is visible to every query of the row. A block on the *partial* list does (ragged
    tail, causal diagonal, window edge, padding). Build plans with `from_scores` or
    `from_block_mask`, which sort the blocks of a row into the two lists.

    A leading `B` or `Hq` of 1 means "the same for all".
    """

    kv_num_blocks: Int[Tensor, "b h n_q"]
    """Partial blocks per row."""
    kv_indices: Int[Tensor, "b h n_q n_partial"]
    """Their indices, ascending, in the first `kv_num_blocks` places; the rest is 0."""
    full_kv_num_blocks: Int[Tensor, "b h n_q"]
    full_kv_indices: Int[Tensor, "b h n_q n_full"]

    block_q: int
    """Tokens per query block."""
    block_k: int
    q_len: int
    """Tokens on the query side; the last block may be ragged."""
    kv_len: int

    q_block_sizes: Int[Tensor, " n_q"] | None = None
    """Valid tokens at the start of each query tile (ragged tiles); None: all but the tail full."""
    k_block_sizes: Int[Tensor, " n_k"] | None = None
    kv_lengths: Int[Tensor, " batch"] | None = None
    """Valid keys per batch entry (right padding); None: all."""

    causal: bool = False
    """Query i sees keys up to `i + q_offset`."""
    q_offset: int = 0
    window: int | None = None
    """Query i sees only the last `window` of those keys (and the sink)."""
    sink: int = 0
    """First keys that a window never hides."""

    # -- geometry ------------------------------------------------------------------------------

    @property
    def num_q_blocks(self) -> int:
        return math.ceil(self.q_len / self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return math.ceil(self.kv_len / self.block_k)

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    @property
    def positional(self) -> bool:
        """Whether visibility depends on the query's position, not only on the key."""
        return self.causal or self.window is not None

    def to(self, device: torch.device | str) -> "SparsePlan":
        """The same plan with its tensors on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def equals(self, other: "SparsePlan") -> bool:
        """Whether both plans hold the same numbers."""
        for f in dataclasses.fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                if not torch.equal(a, b):
                    return False
            elif a is not b and a != b:
                return False
        return True

    def __repr__(self) -> str:
        b, h, n_q, _ = self.kv_indices.shape
        mask = f"causal, q_offset={self.q_offset}" if self.causal else "not causal"
        return (
            f"SparsePlan([{b}, {h}] x {n_q} rows x {self.num_k_blocks} blocks of "
            f"{self.block_q}/{self.block_k} tokens, {self.q_len} queries, {self.kv_len} keys, "
            f"{mask}, density {self.density():.3f})"
        )

    # -- constructors --------------------------------------------------------------------------

    @classmethod
    def from_block_mask(
        cls,
        mask: Bool[Tensor, "b h n_q n_k"],
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        causal: bool = False,
        q_offset: int | None = None,
        window: int | None = None,
        sink: int = 0,
        kv_lengths: Int[Tensor, " batch"] | None = None,
        q_block_sizes: Int[Tensor, " n_q_sizes"] | None = None,
        k_block_sizes: Int[Tensor, " n_k_sizes"] | None = None,
    ) -> "SparsePlan":
        """A plan that reads exactly the blocks that are True in `mask`.

        Args:
            mask: `[B|1, Hq|1, T_q, T_k]`, on any device. Blocks without a visible key are dropped.
            block_q, block_k: tokens per block, >= 1.
            q_len, kv_len: lengths in tokens; `T_q = ceil(q_len / block_q)`, `T_k` likewise.
            causal: bottom-right aligned: query i sees keys up to `i + kv_len - q_len`.
            q_offset: overrides that shift. Default: `kv_len - q_len` when causal, else 0.
            window: visible keys per query, counted back from its own position; needs `causal`.
            sink: first keys that the window never hides.
            kv_lengths: `[B]`, valid keys per batch entry.
            q_block_sizes, k_block_sizes: `[T_q]`, `[T_k]`, valid tokens at the start of each tile.

        Raises:
            ValueError: an argument is out of range or shapes do not match; it names the argument.
        """
        _check_geometry(block_q, block_k, q_len, kv_len)
        n_q, n_k = _check_blocks("mask", mask, block_q, block_k, q_len, kv_len)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: dtype {mask.dtype}; accepted is torch.bool")
        if window is not None and (not isinstance(window, int) or window < 1 or not causal):
            raise ValueError(f"window={window}: accepted is an int >= 1 together with causal=True")
        if sink < 0:
            raise ValueError(f"sink={sink}: accepted is an int >= 0")
        if causal and (q_block_sizes is not None or k_block_sizes is not None):
            raise ValueError(
                "causal=True: ragged tiles have no causal order; leave *_block_sizes out"
            )
        for name, sizes, n, block in (
            ("q_block_sizes", q_block_sizes, n_q, block_q),
            ("k_block_sizes", k_block_sizes, n_k, block_k),
        ):
            if sizes is not None and (
                sizes.shape != (n,) or sizes.min() < 0 or sizes.max() > block
            ):
                raise ValueError(
                    f"{name}: accepted are {n} sizes between 0 and {block}, got {sizes}"
                )
        device = mask.device
        if kv_lengths is not None:
            if kv_lengths.ndim != 1:
                raise ValueError(f"kv_lengths: shape {tuple(kv_lengths.shape)}; accepted is [B]")
            if kv_lengths.min() < 0 or kv_lengths.max() > kv_len:
                raise ValueError(f"kv_lengths: accepted are lengths between 0 and {kv_len}")
            if mask.shape[0] not in (1, len(kv_lengths)):
                raise ValueError(
                    f"kv_lengths: {len(kv_lengths)} lengths for a mask of batch {mask.shape[0]}"
                )
            mask = mask.expand(len(kv_lengths), -1, -1, -1)

        def to_int32(sizes: Tensor | None) -> Tensor | None:
            return None if sizes is None else sizes.to(device=device, dtype=torch.int32)

        nothing = torch.zeros(1, 1, n_q, dtype=torch.int32, device=device)
        plan = cls(  # the rules first; which blocks are full or partial follows from them
            kv_num_blocks=nothing,
            kv_indices=nothing[..., None],
            full_kv_num_blocks=nothing,
            full_kv_indices=nothing[..., None],
            block_q=block_q,
            block_k=block_k,
            q_len=q_len,
            kv_len=kv_len,
            q_block_sizes=to_int32(q_block_sizes),
            k_block_sizes=to_int32(k_block_sizes),
            kv_lengths=to_int32(kv_lengths),
            causal=causal,
            q_offset=q_offset if q_offset is not None else (kv_len - q_len if causal else 0),
            window=window,
            sink=sink,
        )
        some, every = plan._block_visibility()
        kv_num, kv_idx = block_lists(mask & some & ~every)
        full_num, full_idx = block_lists(mask & every)
        return dataclasses.replace(
            plan,
            kv_num_blocks=kv_num,
            kv_indices=kv_idx,
            full_kv_num_blocks=full_num,
            full_kv_indices=full_idx,
        )

    @classmethod
    def from_scores(
        cls,
        scores: Float[Tensor, "b h n_q n_k"],
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        topk: float | None = None,
        top_p: float | None = None,
        threshold: float | None = None,
        causal: bool = False,
        **geometry,
    ) -> "SparsePlan":
        """A plan that keeps the best blocks of each row, at least one.

        Args:
            scores: `[B|1, Hq|1, T_q, T_k]`, logits (see `block_scores`); higher is better.
            topk: fraction in (0, 1]: the `max(1, ceil(topk * T_k))` best blocks of each row.
            top_p: in (0, 1]: the fewest best blocks whose softmax weights sum to at least `top_p`.
                With `topk` too: the union of both.
            threshold: keeps every block whose score is at least this (alone).
            block_q, block_k, q_len, kv_len, causal, **geometry: as in `from_block_mask`.

        Ties go to the lower index, on every device.
        """
        chosen = [
            n
            for n, x in (("topk", topk), ("top_p", top_p), ("threshold", threshold))
            if x is not None
        ]
        if not chosen or ("threshold" in chosen and len(chosen) > 1):
            raise ValueError(
                f"topk, top_p, threshold: got {chosen or 'none'}; accepted are topk, top_p, both, "
                "or threshold alone"
            )
        for name, x in (("topk", topk), ("top_p", top_p)):
            if x is not None and not 0 < x <= 1:
                raise ValueError(f"{name}={x}: accepted is a fraction in (0, 1]")
        _check_geometry(block_q, block_k, q_len, kv_len)
        _, n_k = _check_blocks("scores", scores, block_q, block_k, q_len, kv_len)
        geometry.update(block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len, causal=causal)
        # A block that nobody may read must not use up a place among the best.
        open_blocks = cls.from_block_mask(
            torch.ones(1, 1, *scores.shape[-2:], dtype=torch.bool, device=scores.device), **geometry
        )._block_visibility()[0]
        scores = scores.float().masked_fill(~open_blocks, -math.inf)
        ranked, order = torch.sort(scores, dim=-1, descending=True, stable=True)
        keep = torch.zeros_like(ranked, dtype=torch.bool)
        if topk is not None:
            # The epsilon keeps ceil(.07 * 100) at 7: the product is 7.000000000000001 in binary.
            keep[..., : max(1, math.ceil(topk * n_k - 1e-9))] = True
        if top_p is not None:
            weights = torch.softmax(ranked, dim=-1).nan_to_num(0.0)  # a row without any open block
            keep |= weights.cumsum(-1) - weights < top_p
        if threshold is not None:
            keep |= ranked >= threshold
        keep[..., 0] = True
        mask = torch.zeros_like(keep).scatter_(-1, order, keep) & open_blocks
        return cls.from_block_mask(mask, **geometry)

    # -- what it means ---------------------------------------------------------------------------

    def k_sizes(self) -> Int[Tensor, "b n_k"]:
        """Valid keys in each key block, `[B|1, T_k]` (tail, ragged tiles and `kv_lengths` applied)."""
        sizes = _block_sizes(
            self.k_block_sizes, self.num_k_blocks, self.block_k, self.kv_len, self.device
        )
        if self.kv_lengths is None:
            return sizes[None]
        starts = (
            torch.arange(self.num_k_blocks, device=self.device, dtype=torch.int32) * self.block_k
        )
        return torch.minimum(sizes, (self.kv_lengths[:, None] - starts).clamp(min=0))

    def q_sizes(self) -> Int[Tensor, " n_q"]:
        """Valid queries in each query block, `[T_q]`."""
        return _block_sizes(
            self.q_block_sizes, self.num_q_blocks, self.block_q, self.q_len, self.device
        )

    def visible(self, q_pos: Int[Tensor, "*q"], k_pos: Int[Tensor, "*k"]) -> Bool[Tensor, "*o"]:
        """Causal, window and sink rule for broadcast token positions (not block membership)."""
        last = q_pos + self.q_offset
        seen = k_pos <= last if self.causal else torch.ones_like(k_pos <= last)
        if self.window is not None:
            seen = seen & ((k_pos > last - self.window) | (k_pos < self.sink))
        return seen

    def to_block_mask(self) -> Bool[Tensor, "b h n_q n_k"]:
        """Which blocks are read, `[B|1, Hq|1, T_q, T_k]`."""
        n_k = self.num_k_blocks
        return block_mask(self.kv_num_blocks, self.kv_indices, n_k) | block_mask(
            self.full_kv_num_blocks, self.full_kv_indices, n_k
        )

    def to_dense_mask(self) -> Bool[Tensor, "b h l_q l_k"]:
        """Which keys each query reads, `[B|1, Hq|1, Lq, Lk]`: the definition the kernels follow."""
        q_pos, k_pos, q_ok, k_ok = self._positions()
        mask = self.to_block_mask()[..., q_pos // self.block_q, :][..., k_pos // self.block_k]
        return mask & self.visible(q_pos[:, None], k_pos) & q_ok[:, None] & k_ok[:, None, None]

    def density(self) -> float:
        """Attended (query, key) pairs over the pairs a dense call computes (causal: the triangle)."""
        return float(self.density_tensor())

    def density_tensor(self) -> Float[Tensor, ""]:
        """`density` as a scalar tensor on the plan's device, so that nothing waits for it."""
        blocks = self.to_block_mask()
        if self.positional:
            pairs, dense = self._visible_pairs()
        else:
            pairs = self.q_sizes().double()[:, None] * self.k_sizes().double()[:, None, None, :]
            dense = pairs.sum((-1, -2), keepdim=True)
        attended = (pairs * blocks).sum((-1, -2), keepdim=True)
        return attended.sum() / dense.expand_as(attended).sum().clamp(min=1)

    @torch.no_grad()
    def recall(
        self,
        q: Float[Tensor, "b h l_q d"],
        k: Float[Tensor, "b h_kv l_k d"],
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b h"]:
        """Share of the exact softmax mass that lies in the blocks read, averaged over queries.

        Computed one query block at a time, in fp32 or wider.
        """
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        k = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        q_pos, k_pos, q_ok, k_ok = self._positions()
        blocks = self.to_block_mask()
        total = q.new_zeros(q.shape[:2], dtype=dtype)
        count = torch.zeros(1, dtype=torch.long, device=q.device)
        for i in range(self.num_q_blocks):
            at = slice(i * self.block_q, (i + 1) * self.block_q)
            seen = (self.visible(q_pos[at, None], k_pos) & q_ok[at, None] & k_ok[:, None])[:, None]
            logits = (q[:, :, at].to(dtype) @ k.mT * scale).masked_fill(~seen, -math.inf)
            mass = torch.softmax(logits, -1).nan_to_num(0.0)  # a query without any key
            kept = blocks[:, :, i][..., k_pos // self.block_k]
            total += (mass * kept[:, :, None]).sum((-1, -2))
            count = count + seen.any(-1).sum(-1)
        return total / count.clamp(min=1)

    # -- internals -------------------------------------------------------------------------------

    def _positions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token positions `[Lq]`, `[Lk]` and whether they hold a token: `[Lq]`, `[B|1, Lk]`."""
        q_pos = torch.arange(self.q_len, device=self.device)
        k_pos = torch.arange(self.kv_len, device=self.device)
        q_ok = q_pos % self.block_q < self.q_sizes()[q_pos // self.block_q]
        k_ok = k_pos % self.block_k < self.k_sizes()[:, k_pos // self.block_k]
        return q_pos, k_pos, q_ok, k_ok

    def _block_visibility(self) -> tuple[Tensor, Tensor]:
        """Whether some, and whether every, pair of a block is visible: two `[B|1, 1, T_q, T_k]`.

        A row whose queries run short (the query tail) still counts as full: its missing queries
        are never read. Missing keys are.
        """
        q_sizes, k_sizes = self.q_sizes(), self.k_sizes()
        some = (q_sizes[:, None] > 0) & (k_sizes[:, None, :] > 0)
        every = some & (k_sizes[:, None, :] == self.block_k)
        if self.positional:
            q0 = torch.arange(self.num_q_blocks, device=self.device)[:, None] * self.block_q
            q1 = torch.minimum(q0 + self.block_q, torch.tensor(self.q_len)) - 1 + self.q_offset
            q0 = q0 + self.q_offset
            k0 = torch.arange(self.num_k_blocks, device=self.device) * self.block_k
            k1 = k0 + k_sizes[:, None, :] - 1
            some, every = some & (k0 <= q1), every & (k1 <= q0)
            if self.window is not None:
                some = some & ((k1 > q0 - self.window) | (k0 < self.sink))
                every = every & ((k0 > q1 - self.window) | (k1 < self.sink))
        return some[:, None], every[:, None]

    def _visible_pairs(self) -> tuple[Tensor, Tensor]:
        """Visible pairs per block `[B|1, 1, T_q, T_k]`, and in all (without window) `[B|1, 1, 1, 1]`.

        Counted one query block at a time: a [Lq, Lk] mask would not fit at the lengths this is for.
        """
        q_pos, k_pos, q_ok, k_ok = self._positions()
        pad = self.num_k_blocks * self.block_k - self.kv_len
        rows = []
        for i in range(self.num_q_blocks):
            at = slice(i * self.block_q, (i + 1) * self.block_q)
            seen = self.visible(q_pos[at, None], k_pos) & q_ok[at, None] & k_ok[:, None]
            per_key = torch.nn.functional.pad(seen.sum(1, dtype=torch.float64), (0, pad))
            rows.append(per_key.unflatten(-1, (-1, self.block_k)).sum(-1))
        lengths = torch.tensor([self.kv_len]) if self.kv_lengths is None else self.kv_lengths
        last = (q_pos + self.q_offset + 1).clamp(min=0)
        dense = torch.minimum(last, lengths.to(self.device)[:, None]).sum(1).double()
        return torch.stack(rows, dim=1)[:, None], dense.view(-1, 1, 1, 1)


torch.export.register_dataclass(SparsePlan)


def _check_geometry(block_q: int, block_k: int, q_len: int, kv_len: int) -> None:
    for name, value in (
        ("block_q", block_q),
        ("block_k", block_k),
        ("q_len", q_len),
        ("kv_len", kv_len),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: accepted is an int >= 1")


def _check_blocks(
    name: str, x: Tensor, block_q: int, block_k: int, q_len: int, kv_len: int
) -> tuple[int, int]:
    """`(T_q, T_k)`, which the last two sizes of `x` have to be."""
    n_q, n_k = math.ceil(q_len / block_q), math.ceil(kv_len / block_k)
    if x.ndim != 4 or tuple(x.shape[-2:]) != (n_q, n_k):
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, but {q_len} queries in blocks of {block_q} and "
            f"{kv_len} keys in blocks of {block_k} need [B|1, Hq|1, {n_q}, {n_k}]"
        )
    return n_q, n_k


def _block_sizes(
    given: Tensor | None, n: int, block: int, length: int, device: torch.device
) -> Tensor:
    starts = torch.arange(n, device=device, dtype=torch.int32) * block
    sizes = (length - starts).clamp(max=block)
    return sizes if given is None else torch.minimum(sizes, given)
