"""Lengths, blocks and visibility rules of a plan, without its lists."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dit_accel.kernels.lists import check_range, reads_freely


@dataclass(frozen=True, eq=False, kw_only=True)
class Rules:
    """Fields that `Geometry` and `SparsePlan` share: lengths, blocks, and the visibility rules of keys."""

    block_q: int
    """Tokens per query block."""
    block_k: int
    q_len: int
    """Number of queries. The last block may be shorter than `block_q`."""
    kv_len: int

    q_block_sizes: Int[Tensor, " n_q"] | None = None
    """Number of valid tokens at the start of each query block (ragged blocks). None: all blocks but the last are full."""
    k_block_sizes: Int[Tensor, " n_k"] | None = None
    kv_lengths: Int[Tensor, " batch"] | None = None
    """Number of valid keys of each batch entry (right padding). None: all keys."""
    columns: Int[Tensor, "b_columns h_columns n_columns"] | None = None
    """Single keys that every query of a head reads in addition, under the same rules. Ascending; unused places at the
    end hold `kv_len`. A column inside a block that the row reads is read once."""
    q_order: Int[Tensor, "h_order l_q"] | None = None
    """Permutation of the queries, `[Hq|1, Lq]`: row r of the query blocks is query `q_order[r]`. None: identity."""
    long_rows: Int[Tensor, " n_long"] | None = None
    """Indices of query blocks that read very many keys. Kernels may split them, and plans may store them without lists.
    Results do not change."""

    causal: bool = False
    """Causal mask: query i sees keys up to `i + q_offset`."""
    q_offset: int = 0
    window: int | None = None
    """Sliding window: a query sees only the last `window` keys of the causal range, and the sink. None: no window."""
    sink: int = 0
    """Number of first keys that the window never hides."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        raise NotImplementedError

    @property
    def num_q_blocks(self) -> int:
        return math.ceil(self.q_len / self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return math.ceil(self.kv_len / self.block_k)

    @property
    def positional(self) -> bool:
        """True if visibility depends on the position of the query, not only on the key."""
        return self.causal or self.window is not None

    @property
    def ragged(self) -> bool:
        """True if blocks before the last one may have fewer than `block_k` keys."""
        return self.positional or self.k_block_sizes is not None or self.kv_lengths is not None

    def leading_sizes(self) -> Iterator[tuple[str, int, int]]:
        """Return name, batch size and number of heads of each tensor with these axes."""
        if self.columns is not None:
            yield "columns", self.columns.shape[0], self.columns.shape[1]
        if self.q_order is not None:
            yield "q_order", 1, self.q_order.shape[0]
        if self.kv_lengths is not None:
            yield "kv_lengths", self.kv_lengths.shape[0], 1

    def check_numbers(self) -> None:
        """Raise ValueError if a number in a tensor is out of range; the message names the field.

        Reads every tensor, so a GPU call waits for the device. Constructors and operators call it on a CPU, and on
        other devices only with the environment variable `DIT_ACCEL_DEBUG=1`.
        """
        for name, most in (
            ("q_block_sizes", self.block_q),
            ("k_block_sizes", self.block_k),
            ("kv_lengths", self.kv_len),
            ("columns", self.kv_len),
            ("long_rows", self.num_q_blocks - 1),
        ):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), most)
        if self.columns is not None:
            step = self.columns.diff(dim=-1)
            if not bool(((step > 0) | (self.columns[..., 1:] == self.kv_len)).all()):
                raise ValueError(
                    f"columns: not ascending; accepted are ascending keys, then only {self.kv_len}"
                )
        if self.q_order is not None:
            in_order = torch.arange(self.q_len, dtype=torch.int32, device=self.device)
            if not bool((self.q_order.sort(-1).values == in_order).all()):
                raise ValueError(
                    f"q_order: not a permutation; accepted are the numbers 0 to {self.q_len - 1}, each once"
                )

    def k_sizes(self) -> Int[Tensor, "b n_k"]:
        """Return the number of valid keys in each key block, `[B|1, T_k]`: tail, ragged blocks and `kv_lengths` applied."""
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
        """Return the number of valid queries in each query block, `[T_q]`."""
        return _block_sizes(
            self.q_block_sizes, self.num_q_blocks, self.block_q, self.q_len, self.device
        )

    def visible(self, q_pos: Int[Tensor, "*q"], k_pos: Int[Tensor, "*k"]) -> Bool[Tensor, "*o"]:
        """Return whether queries see keys under the causal, window and sink rules, for broadcast token positions.

        Block membership is not considered.
        """
        last = q_pos + self.q_offset
        seen = k_pos <= last if self.causal else torch.ones_like(k_pos <= last)
        if self.window is not None:
            seen = seen & ((k_pos > last - self.window) | (k_pos < self.sink))
        return seen


@dataclass(frozen=True, eq=False, kw_only=True)
class Geometry(Rules):
    """Lengths, blocks and visibility rules that several plans share. `Geometry.of` makes one and checks it.

    Plans of all layers and sampling steps with the same lengths can use the same geometry:
    `SparsePlan.from_scores(scores, geometry=geometry, topk=0.1)`.
    """

    _device: torch.device

    @property
    def device(self) -> torch.device:
        return self._device

    @classmethod
    def of(
        cls,
        device: torch.device | str,
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
        columns: Int[Tensor, "b3 h3 n_columns"] | None = None,
        q_order: Int[Tensor, "h4 l_q"] | None = None,
        long_rows: Int[Tensor, " n_long"] | None = None,
    ) -> "Geometry":
        """Return a geometry after checking its arguments, which are those of `SparsePlan.from_block_mask` without the mask.

        Tensors are moved to `device`.

        Raises:
            ValueError: an argument is out of range or shapes do not match; it names the argument.
                Numbers inside tensors are checked on a CPU only.
        """
        device = torch.device(device)
        for name, value in (
            ("block_q", block_q),
            ("block_k", block_k),
            ("q_len", q_len),
            ("kv_len", kv_len),
        ):
            if not isinstance(value, int | torch.SymInt) or value < 1:
                raise ValueError(f"{name}={value!r}: accepted is an int >= 1")
        if window is not None and (not isinstance(window, int) or window < 1 or not causal):
            raise ValueError(f"window={window}: accepted is an int >= 1 together with causal=True")
        if q_offset is not None and not isinstance(q_offset, int | torch.SymInt):
            raise ValueError(f"q_offset={q_offset!r}: accepted is an int")
        if not isinstance(sink, int | torch.SymInt) or sink < 0 or (sink and window is None):
            raise ValueError(f"sink={sink}: accepted is an int >= 0, above 0 only with a window")
        if causal and (q_block_sizes is not None or k_block_sizes is not None):
            raise ValueError(
                "causal=True: accepted without q_block_sizes and k_block_sizes; ragged blocks have no causal order"
            )
        if q_order is not None and q_block_sizes is not None:
            raise ValueError("q_order: accepted without q_block_sizes; order the blocks instead")
        tensors = {
            "q_block_sizes": q_block_sizes,
            "k_block_sizes": k_block_sizes,
            "kv_lengths": kv_lengths,
            "columns": columns,
            "q_order": q_order,
            "long_rows": long_rows,
        }
        given = {name: _int32(name, x, device) for name, x in tensors.items() if x is not None}
        geometry = cls(
            block_q=block_q,
            block_k=block_k,
            q_len=q_len,
            kv_len=kv_len,
            causal=causal,
            q_offset=q_offset if q_offset is not None else (kv_len - q_len if causal else 0),
            window=window,
            sink=sink,
            _device=device,
            **given,
        )
        if given:
            geometry._check_shapes()
            if reads_freely(next(iter(given.values()))):
                geometry.check_numbers()
        return geometry

    def _check_shapes(self) -> None:
        for name, sizes, n in (
            ("q_block_sizes", self.q_block_sizes, self.num_q_blocks),
            ("k_block_sizes", self.k_block_sizes, self.num_k_blocks),
        ):
            if sizes is not None and tuple(sizes.shape) != (n,):
                raise ValueError(
                    f"{name}: shape {tuple(sizes.shape)}; accepted are {n} sizes, one per block"
                )
        if self.kv_lengths is not None and self.kv_lengths.ndim != 1:
            raise ValueError(f"kv_lengths: shape {tuple(self.kv_lengths.shape)}; accepted is [B]")
        if self.columns is not None and self.columns.ndim != 3:
            raise ValueError(
                f"columns: shape {tuple(self.columns.shape)}; accepted is [B|1, Hq|1, C]"
            )
        order = self.q_order
        if order is not None and (order.ndim != 2 or order.shape[1] != self.q_len):
            raise ValueError(
                f"q_order: shape {tuple(order.shape)}; accepted is [Hq|1, {self.q_len}]"
            )


def _int32(name: str, x: Tensor, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: {kind}; accepted is a tensor of integers")
    return x.to(device=device, dtype=torch.int32)


def _block_sizes(
    given: Tensor | None, n: int, block: int, length: int, device: torch.device
) -> Tensor:
    starts = torch.arange(n, device=device, dtype=torch.int32) * block
    sizes = (length - starts).clamp(max=block)
    return sizes if given is None else torch.minimum(sizes, given)
