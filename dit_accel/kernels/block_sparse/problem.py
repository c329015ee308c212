"""`Problem`: inputs and plan of one call, unpacked for its launches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.tiles import Kernel, Target, Tile, Variant, pad, tile
from dit_accel.kernels.block_sparse.unread_kernel import unread_kernel
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.linear.state_kernel import state_kernel, totals_kernel
from dit_accel.kernels.lists import Lists, block_lists, block_mask, pack_bits
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.router import pool_blocks
from dit_accel.kernels.visibility import row_ends

# Tile variants by EXTRA_KEYS: none, columns, block means.
EXTRA_TILES: tuple[Variant, ...] = ("plain", "extra", "means")
FEATURES = {"softmax": 0, "elu": 1, "relu": 2}
# Number of tokens that one program of the state kernel sums.
STATE_SPAN = 2048
# Number of the D rows of a state that one program of the totals kernel sums.
TOTALS_ROWS = 16

STRIDES = (("q_b", "q_h", "q_l"), ("k_b", "k_h", "k_l"), ("v_b", "v_h", "v_l"))

Run = Callable[[Launch], Any]


@dataclass
class Problem:
    """Inputs and plan of one call, unpacked once for all of its launches."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: SparsePlan
    shared_softmax: bool
    linear: Linear | None
    target: Target
    run: Run

    def __post_init__(self) -> None:
        plan = self.plan
        self.batch, self.heads = self.q.shape[:2]
        self.kv_heads = self.k.shape[1]
        self.head_dim, self.value_dim = self.q.shape[-1], self.v.shape[-1]
        self.per_key = 1.0 / self.k.shape[2]
        self.read = (
            Lists(plan.full_kv_num_blocks, plan.full_kv_indices),
            Lists(plan.kv_num_blocks, plan.kv_indices),
        )
        self.skip: Lists | None = None
        marginal = self.linear is not None and self.linear.scope == "marginal"
        if marginal and plan.skip_num_blocks is not None and plan.skip_indices is not None:
            self.skip = Lists(plan.skip_num_blocks, plan.skip_indices)
        self.mode, self.extra = self._linear_mode()
        self.extra_keys = 2 if self.shared_softmax else int(plan.columns is not None)
        self.lead = self._lead_shape()
        self.strides: dict[str, int] = {}
        widths = self.head_dim | self.value_dim
        for names, x in zip(STRIDES, (self.q, self.k, self.v), strict=True):
            for name, stride in zip(names, x.stride(), strict=False):
                self.strides[name] = stride
                widths |= stride
        half = self.q.dtype != torch.float32
        cuda = self.target.backend == "cuda"
        self.precision = ("tf32" if half else "tf32x3") if cuda else "ieee"
        self.dims: dict[str, int | bool | str] = {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "DP": pad(self.head_dim),
            "PRECISION": self.precision,
            "ALIGNED": widths % 8 == 0,  # True if all strides are multiples of 8
        }

    def _linear_mode(self) -> tuple[int, Lists | None]:
        """Return the mode of the linear branch (LINEAR of forward.py) and its extra lists.

        A subtraction loses log2(total / rest) bits, so a row that reads and skips half of the blocks or
        more sums its linear set directly. The plan's `row_bound` determines whether such rows may exist.
        """
        if self.linear is None:
            return 0, None
        if self.linear.scope == "all":
            return 1, None
        plan, n_k = self.plan, self.plan.num_k_blocks
        if plan.row_bound is not None and 2 * plan.row_bound < n_k:
            return 2, self.skip
        summed = plan.linear_blocks(self.linear.scope)
        left_out = plan.full_kv_num_blocks + plan.kv_num_blocks
        skipped = torch.zeros_like(summed)
        if self.skip is not None:
            left_out = left_out + self.skip.counts
            skipped = block_mask(*self.skip, n_k)
        heavy = (2 * left_out >= n_k)[
            ..., None
        ]  # the same rule as in forward.py and backward_rows.py
        return 3, block_lists(torch.where(heavy, summed, skipped))

    def _lead_shape(self) -> torch.Size:
        """Return the leading sizes `[B|1, Hq|1]` that all lists of this call are expanded to."""
        plan = self.plan
        shapes = [x.counts.shape[:2] for x in (*self.read, self.skip, self.extra) if x is not None]
        if plan.columns is not None:
            shapes.append(plan.columns.shape[:2])
        if self.shared_softmax and plan.kv_lengths is not None:
            shapes.append(torch.Size((len(plan.kv_lengths), 1)))
        return shapes[0] if len(set(shapes)) == 1 else torch.broadcast_shapes(*shapes)

    # -- pieces of launches ------------------------------------------------------------------------

    def tile(self, kernel: Kernel, heads: int = 1) -> Tile:
        """Return the tile of a launch whose programs compute the query blocks of `heads` heads together."""
        return tile(
            kernel,
            self.target,
            head_dim=max(self.head_dim, self.value_dim),
            dtype=self.q.dtype,
            block_q=heads * self.plan.block_q,
            block_k=self.plan.block_k,
            variant="heavy" if self.mode >= 2 else EXTRA_TILES[self.extra_keys],
        )

    def constants(self, kernel: Kernel, heads: int = 1) -> tuple[dict[str, Any], dict[str, int]]:
        """Return the constants that all attention kernels share, and the launch options. `heads` as in `tile`."""
        plan = self.plan
        size = self.tile(kernel, heads)
        constants = {
            **self.dims,
            "DVP": pad(self.value_dim),
            "BLOCK_Q": plan.block_q,
            "BLOCK_K": plan.block_k,
            "TQ": size.q,
            "TK": size.k,
            "POSITIONAL": plan.positional,
            "WINDOW": plan.window is not None,
        }
        return constants, {"num_warps": size.warps, "num_stages": size.stages}

    def linear_constants(self) -> dict[str, int]:
        feature = 0 if self.linear is None else FEATURES[self.linear.feature_map]
        return {"LINEAR": self.mode, "FEATURE": feature}

    def key_rules(self) -> dict[str, Any]:
        """Return the kernel arguments with the number of keys, and the valid keys of each block and sample."""
        return {
            "k_len": self.plan.kv_len,
            "K_SIZES": self.plan.k_block_sizes,
            "KV_LENGTHS": self.plan.kv_lengths,
        }

    def row_rules(self) -> dict[str, Any]:
        """Return the kernel arguments with order and validity of the queries."""
        plan = self.plan
        return {
            "q_len": plan.q_len,
            "Q_SIZES": plan.q_block_sizes,
            "Q_ORDER": plan.q_order,
            "order_h": plan.q_len if plan.q_order is not None and len(plan.q_order) > 1 else 0,
        }

    def rules(self) -> dict[str, Any]:
        """Return the kernel arguments with all visibility rules."""
        plan = self.plan
        return {
            **self.key_rules(),
            **self.row_rules(),
            "n_k": plan.num_k_blocks,
            "group": self.heads // self.kv_heads,
            "q_offset": plan.q_offset,
            "window": plan.window or 0,
            "sink": plan.sink,
        }

    def list_strides(self, lead: torch.Size | None = None) -> dict[str, int]:
        """Return the strides of lists between samples and between heads."""
        lead = lead or self.lead
        return {"list_b": lead[1] if lead[0] > 1 else 0, "list_h": 1 if lead[1] > 1 else 0}

    def lists(self, lead: torch.Size | None = None, **lists: Lists | None) -> dict[str, Any]:
        """Return lists expanded to one leading shape (default: that of the call), and their strides."""
        out: dict[str, Any] = self.list_strides(lead)
        for name, x in lists.items():
            out[f"{name.upper()}_NUM"] = None if x is None else self.led(x.counts, lead)
            out[f"{name.upper()}_INDEX"] = None if x is None else self.led(x.indices, lead)
            out[f"n_{name}"] = 0 if x is None else x.indices.shape[-1]
        return out

    def row_lists(self) -> dict[str, Any]:
        """Return the lists of each query block: full, partial, extra (of the linear branch), and skip lists."""
        lists = self.lists(full=self.read[0], part=self.read[1], extra=self.extra)
        return {**lists, "SKIP_NUM": None if self.skip is None else self.led(self.skip.counts)}

    def led(self, x: Tensor, lead: torch.Size | None = None) -> Tensor:
        """Return `x` with its two leading sizes expanded to `lead`."""
        lead = lead or self.lead
        return (x if x.shape[:2] == lead else x.expand(*lead, *x.shape[2:])).contiguous()

    def extra_key_arguments(self) -> dict[str, Any]:
        """Return the kernel arguments of extra keys: columns, or block means with their weights in each row."""
        plan = self.plan
        out: dict[str, Any] = {
            "COVER": None,
            "COLUMNS": None,
            "UNREAD": None,
            "CENTROID_K": None,
            "CENTROID_V": None,
            "n_bytes": 0,
            "n_columns": 0,
        }
        if self.extra_keys == 1:
            assert plan.columns is not None
            cover = self.led(pack_bits(plan.to_block_mask()))
            out |= {"COVER": cover, "n_bytes": cover.shape[-1]}
            out |= {"COLUMNS": self.led(plan.columns), "n_columns": plan.columns.shape[-1]}
        elif self.extra_keys == 2:
            ragged = plan.k_block_sizes is not None or plan.kv_lengths is not None
            sizes = plan.k_sizes() if ragged else None
            for name, x in (("CENTROID_K", self.k), ("CENTROID_V", self.v)):
                out[name] = pool_blocks(x, plan.block_k, sizes, dtype=x.dtype)
            out["UNREAD"] = self.unread()
        return out

    def unread(self) -> Tensor:
        """Return the weights of block means; see `unread_kernel`."""
        plan, n_k = self.plan, self.plan.num_k_blocks
        shape = (*self.lead, plan.num_q_blocks, -(-n_k // 128) * 128)
        # fp16 is exact for whole blocks. For a ragged block its rounding error is below that of half-precision scores.
        half = self.q.dtype != torch.float32
        out = self.q.new_empty(shape, dtype=torch.float16 if half else torch.float32)
        lists = self.lists(full=self.read[0], part=self.read[1])
        arguments = {
            **lists,
            **self.key_rules(),
            "UNREAD": out,
            "n_q": plan.num_q_blocks,
            "n_k": n_k,
        }
        grid = (plan.num_q_blocks, self.lead[1], self.lead[0])
        constants: dict[str, Any] = {"BLOCK_K": plan.block_k, "TN": 128}
        self.run(Launch(unread_kernel, grid, arguments, constants, num_warps=1, num_stages=1))
        return out

    def column_counts(self) -> Tensor | None:
        """Return the number of columns that some query of each block may see, `[*lead, T_q]`. Kernels skip the rest."""
        plan = self.plan
        if plan.columns is None:
            return None
        last = torch.full((1, plan.num_q_blocks), plan.kv_len - 1, device=plan.device)
        if plan.causal:
            last = row_ends(plan)[1]
        last = last.clamp(max=plan.kv_len - 1).expand(*self.lead, -1).contiguous()
        columns = self.led(plan.columns)
        return torch.searchsorted(columns, last.to(columns.dtype), right=True, out_int32=True)

    # -- the linear branch's totals -----------------------------------------------------------------

    def key_totals(self, proj_weight: Tensor | None = None) -> dict[str, Tensor | None]:
        """Return PHI_K, STATE and STATE_Z. The sums are divided by the number of keys, so that half types do not overflow.

        Args:
            proj_weight: multiply the state by its transpose, for a kernel that adds o_l without a projection.
        """
        if self.linear is None:
            return {"PHI_K": None, "STATE": None, "STATE_Z": None}
        phi, parts = None, self.linear.state
        if parts is None or self.mode >= 2:
            phi, *sums = self.parts(self.k, self.v, self.key_rules(), want_phi=self.mode >= 2)
            parts = parts or (sums[0], sums[1])
        state, state_z = self.totals(parts, proj_weight=proj_weight)
        return {"PHI_K": phi, "STATE": state, "STATE_Z": state_z}

    def parts(
        self,
        x: Tensor,
        y: Tensor,
        rules: dict[str, Any],
        *,
        norm: Tensor | None = None,
        term: Tensor | None = None,
        want_phi: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return phi(x) if `want_phi`, and the sums of `state_kernel`, fp32 `[part, B, H, D, Dv]` and `[part, B, H, D]`."""
        assert self.linear is not None
        batch, heads, length, d = x.shape
        parts = math.ceil(length / STATE_SPAN)
        phi = x.new_empty(batch, heads, length, d) if want_phi else None
        out = x.new_empty(parts, batch, heads, d, self.value_dim, dtype=torch.float32)
        out_z = x.new_empty(parts, batch, heads, d, dtype=torch.float32)
        size = tile(
            "state",
            self.target,
            head_dim=d,
            dtype=x.dtype,
            block_q=STATE_SPAN,
            block_k=self.value_dim,
        )
        arguments = {
            "X": x,
            "Y": y,
            "K_SIZES": rules["K_SIZES"],
            "KV_LENGTHS": rules["KV_LENGTHS"],
            "NORM": norm,
            "TERM": term,
            "PHI": phi,
            "OUT": out,
            "OUT_Z": out_z,
            **{f"x_{a}": n for a, n in zip("bhl", x.stride()[:3], strict=True)},
            **{f"y_{a}": n for a, n in zip("bhl", y.stride()[:3], strict=True)},
            "length": length,
            "span": STATE_SPAN,
        }
        constants = {
            **self.dims,
            "TV": size.k,
            "BLOCK": self.plan.block_k,
            "TL": size.q,
            "FEATURE": FEATURES[self.linear.feature_map],
        }
        grid = (parts * math.ceil(self.value_dim / size.k), heads, batch)
        options = {"num_warps": size.warps, "num_stages": size.stages}
        self.run(Launch(state_kernel, grid, arguments, constants, **options))
        return phi, out, out_z

    def totals(
        self, parts: tuple[Tensor, Tensor], *, proj_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sums over parts and over the query heads of a key head, per key: `[B, Hkv, D, Dv]`, `[B, Hkv, D]`."""
        kv, z = (x.float().contiguous() for x in parts)  # the caller's state may be fp64
        heads = z.shape[-2]
        state = self.q.new_empty(self.batch, self.kv_heads, self.head_dim, self.value_dim)
        state_z = z.new_empty(self.batch, self.kv_heads, self.head_dim)
        arguments = {
            "PARTS": kv,
            "PARTS_Z": z,
            "PROJ_W": None if proj_weight is None else proj_weight.contiguous(),
            "STATE": state,
            "STATE_Z": state_z,
            "n_parts": len(z) if z.ndim == 4 else 1,
            "group": heads // self.kv_heads,
            "factor": self.per_key,
        }
        constants = {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "DP": pad(self.head_dim),
            "DVP": pad(self.value_dim),
            "TD": TOTALS_ROWS,
            "PRECISION": "tf32x3" if self.target.backend == "cuda" else "ieee",
        }
        grid = (math.ceil(self.head_dim / TOTALS_ROWS), self.kv_heads, self.batch)
        self.run(Launch(totals_kernel, grid, arguments, constants, num_warps=8, num_stages=2))
        return state, state_z
