"""The Triton backend: which kernels run, with what, in which order. Same functions as torch_backend.

Nothing here waits for the device or depends on numbers in tensors, so calls can be captured in a CUDA
graph. `run` is what happens to each launch: it runs, or it is collected to be compiled elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.backward_columns import columns_kernel, gathered_kernel
from dit_accel.kernels.block_sparse.backward_rows import rows_kernel
from dit_accel.kernels.block_sparse.forward import forward_kernel, merge_kernel
from dit_accel.kernels.block_sparse.tiles import Kernel, Target, pad, tile
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.linear import torch_branch
from dit_accel.kernels.linear.columns_kernel import linear_columns_kernel
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.linear.state_kernel import state_kernel
from dit_accel.kernels.lists import Lists, block_lists, pack_bits
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.router import pool_blocks
from dit_accel.kernels.visibility import row_ends

LOG2E = math.log2(math.e)
FEATURES = {"softmax": 0, "elu": 1, "relu": 2}
# A row of more keys than this is split over several programs, if there are few programs or the plan
# names the row.
SPLIT_TOKENS = 4096
FEW_PROGRAMS = 128
# One program of the state kernel sums this many tokens.
STATE_SPAN = 2048

Run = Callable[[Launch], Any]


@dataclass
class _Problem:
    """Inputs and plan, unpacked once for every launch of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: SparsePlan
    scale: float
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
        self.mode, self.extra = self._linear_mode()
        self.k_sizes = plan.k_sizes().contiguous()
        self.extra_keys = 2 if self.shared_softmax else int(plan.columns is not None)
        self.cover = pack_bits(plan.to_block_mask()) if self.extra_keys else None
        self.columns = plan.columns
        self.centroids: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if self.shared_softmax:
            self.centroids = (self._centroids(self.k), self._centroids(self.v))

    def _linear_mode(self) -> tuple[int, Lists | None]:
        """How the linear branch sums (see forward.py), and the lists it walks besides those read.

        Subtracting loses what total / rest gains, so rows that may read half of the blocks sum the
        rest directly.
        """
        if self.linear is None:
            return 0, None
        if self.linear.scope == "all":
            return 1, None
        plan, skip = self.plan, None
        if self.linear.scope == "marginal" and plan.skip_num_blocks is not None:
            assert plan.skip_indices is not None
            skip = Lists(plan.skip_num_blocks, plan.skip_indices)
        most = max(x.indices.shape[-1] for x in self.read)
        most += 0 if skip is None else skip.indices.shape[-1]
        if self.linear.state is None and 2 * most >= plan.num_k_blocks:
            return 3, block_lists(plan.linear_blocks(self.linear.scope))
        return 2, skip

    def _centroids(self, x: Tensor) -> Tensor:
        return pool_blocks(x, self.plan.block_k, self.k_sizes, dtype=x.dtype)

    # -- pieces of launches ------------------------------------------------------------------------

    def dims(self) -> dict[str, int | bool | str]:
        half = self.q.dtype != torch.float32
        exact = "tf32x3" if self.target.backend == "cuda" else "ieee"
        return {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "DP": pad(self.head_dim),
            "PRECISION": "tf32" if half and self.target.backend == "cuda" else exact,
            "ALIGNED": all(
                n % 8 == 0 for n in (*self.strides().values(), self.head_dim, self.value_dim)
            ),
        }

    def constants(self, kernel: Kernel) -> tuple[dict[str, Any], dict[str, int]]:
        """Constants that all attention kernels share, and the launch options."""
        plan = self.plan
        size = tile(
            kernel,
            self.target,
            head_dim=max(self.head_dim, self.value_dim),
            dtype=self.q.dtype,
            block_q=plan.block_q,
            block_k=plan.block_k,
            heavy=self.mode >= 2 or (kernel == "rows" and self.extra_keys > 0),
        )
        constants = {
            **self.dims(),
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

    def strides(self) -> dict[str, int]:
        return {
            f"{name}_{axis}": x.stride(i)
            for name, x in (("q", self.q), ("k", self.k), ("v", self.v))
            for i, axis in enumerate("bhl")
        }

    def rules(self) -> dict[str, int]:
        plan = self.plan
        return {
            "q_len": plan.q_len,
            "k_len": plan.kv_len,
            "n_k": plan.num_k_blocks,
            "size_b": self.k_sizes.shape[1] if len(self.k_sizes) > 1 else 0,
            "order_h": plan.q_len if plan.q_order is not None and len(plan.q_order) > 1 else 0,
            "group": self.heads // self.kv_heads,
            "q_offset": plan.q_offset,
            "window": plan.window or 0,
            "sink": plan.sink,
        }

    def lists(self, **lists: Lists | None) -> dict[str, Any]:
        """Lists of one leading shape `[B|1, Hq|1]`, with the strides that walk it."""
        shapes = [
            torch.Size((1, 1)),
            *(x.counts.shape[:2] for x in lists.values() if x is not None),
        ]
        if self.columns is not None:
            shapes.append(self.columns.shape[:2])
        lead = torch.broadcast_shapes(*shapes)
        out: dict[str, Any] = {
            "list_b": lead[1] if lead[0] > 1 else 0,
            "list_h": 1 if lead[1] > 1 else 0,
        }
        for name, x in lists.items():
            out[f"{name.upper()}_NUM"] = None if x is None else _lead(x.counts, lead)
            out[f"{name.upper()}_INDEX"] = None if x is None else _lead(x.indices, lead)
            out[f"n_{name}"] = 0 if x is None else x.indices.shape[-1]
        self.lead = lead
        return out

    def extra_key_arguments(self) -> dict[str, Any]:
        """Columns or block means, and the bits that say which of their blocks a row reads anyway."""
        none = {"COVER": None, "COLUMNS": None, "n_bytes": 0, "n_columns": 0}
        if self.cover is None:
            return {**none, "CENTROID_K": None, "CENTROID_V": None}
        columns = None if self.columns is None else _lead(self.columns, self.lead)
        return {
            "COVER": _lead(self.cover, self.lead),
            "COLUMNS": columns,
            "n_bytes": self.cover.shape[-1],
            "n_columns": 0 if columns is None else columns.shape[-1],
            "CENTROID_K": self.centroids[0],
            "CENTROID_V": self.centroids[1],
        }

    def column_counts(self) -> Tensor | None:
        """Columns that some query of each row block may see, `[*lead, T_q]`: the rest is not walked."""
        if self.columns is None:
            return None
        plan = self.plan
        columns = _lead(self.columns, self.lead)
        last = torch.full((1, plan.num_q_blocks), plan.kv_len - 1, device=plan.device)
        if plan.causal:
            last = row_ends(plan)[1]
        last = last.clamp(max=plan.kv_len - 1).expand(*self.lead, -1).contiguous()
        return torch.searchsorted(columns, last.to(columns.dtype), right=True, out_int32=True)

    # -- the linear branch's totals -----------------------------------------------------------------

    def totals(
        self,
        x: Tensor,
        y: Tensor,
        *,
        sizes: Tensor | None,
        norm: Tensor | None = None,
        term: Tensor | None = None,
        want_phi: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """phi(x) if wanted, and the sums of `state_kernel`, fp32 `[B, H, D, Dv]` and `[B, H, D]`."""
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
        self.run(
            Launch(
                kernel=state_kernel,
                grid=(parts * math.ceil(self.value_dim / size.k), heads, batch),
                arguments={
                    "X": x,
                    "Y": y,
                    "SIZES": sizes,
                    "NORM": norm,
                    "TERM": term,
                    "PHI": phi,
                    "OUT": out,
                    "OUT_Z": out_z,
                    **{f"x_{a}": x.stride(i) for i, a in enumerate("bhl")},
                    **{f"y_{a}": y.stride(i) for i, a in enumerate("bhl")},
                    "length": length,
                    "span": STATE_SPAN,
                    "size_b": self.rules()["size_b"],
                },
                constants={
                    **self.dims(),
                    "TV": size.k,
                    "BLOCK": self.plan.block_k,
                    "TL": size.q,
                    "FEATURE": FEATURES[self.linear.feature_map],
                },
                num_warps=size.warps,
                num_stages=size.stages,
            )
        )
        return phi, out.sum(0), out_z.sum(0)

    def key_totals(self) -> dict[str, Tensor | None]:
        """PHI_K, STATE and STATE_Z, the sums per key so that half types do not overflow."""
        if self.linear is None:
            return {"PHI_K": None, "STATE": None, "STATE_Z": None}
        phi, state, state_z = self.totals(
            self.k, self.v, sizes=self.k_sizes, want_phi=self.mode >= 2
        )
        if self.linear.state is not None:
            state, state_z = self.linear.state
        return {
            "PHI_K": phi,
            "STATE": (state * self.per_key).to(self.k.dtype).contiguous(),
            "STATE_Z": (state_z.float() * self.per_key).contiguous(),
        }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    shared_softmax: bool,
    linear: Linear | None,
    want_lse: bool,
    target: Target | None = None,
    run: Run = Launch.__call__,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`o, lse, o_l, norm`; lse is empty unless wanted, o_l and norm without a linear branch."""
    target = target or Target.of(q.device)
    if linear is not None and not _fuses(q, v):
        o, lse, _, _ = forward(
            q,
            k,
            v,
            plan,
            scale=scale,
            shared_softmax=shared_softmax,
            linear=None,
            want_lse=want_lse,
            target=target,
            run=run,
        )
        return o, lse, *torch_branch.forward(q, k, v, plan, linear)
    p = _Problem(q, k, v, plan, scale, shared_softmax, linear, target, run)
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    rows = q.shape[:3]
    lse = q.new_empty(rows if want_lse else (0,), dtype=torch.float32)
    o_l = q.new_empty(o.shape if linear is not None else (0,))
    norm = q.new_empty(rows if linear is not None else (0,), dtype=torch.float32)
    constants, options = p.constants("forward")
    lists = p.lists(full=p.read[0], part=p.read[1], extra=p.extra)
    arguments: dict[str, Any] = {
        "Q": q,
        "K": k,
        "V": v,
        "O": o,
        "LSE": lse,
        **lists,
        "K_SIZES": p.k_sizes,
        "Q_SIZES": plan.q_block_sizes,
        "Q_ORDER": plan.q_order,
        **p.extra_key_arguments(),
        "COLUMN_NUM": p.column_counts(),
        **p.key_totals(),
        "O_L": o_l,
        "NORM": norm,
        "LONG_ROWS": None,
        "IS_LONG": None,
        **p.strides(),
        **p.rules(),
        "n_q": plan.num_q_blocks,
        "scale": scale * LOG2E,
        "n_keys": float(plan.kv_len),
        "long_blocks": 0,
        "n_long": 1,
    }
    constants = {
        **constants,
        **p.linear_constants(),
        "EXTRA_KEYS": p.extra_keys,
        "SPLIT": 0,
        "WANT_LSE": want_lse,
    }
    sub = math.ceil(plan.block_q / constants["TQ"])
    heads_and_batch = (p.heads, p.batch)
    long_rows = _long_rows(
        plan, plan.num_q_blocks * sub * p.heads * p.batch, linear, shared_softmax
    )
    if long_rows is None:
        run(
            Launch(
                forward_kernel,
                (plan.num_q_blocks * sub, *heads_and_batch),
                arguments,
                constants,
                **options,
            )
        )
        return o, lse, o_l, norm
    n_long = len(long_rows)
    blocks = max(1, SPLIT_TOKENS // plan.block_k)
    segments = math.ceil(plan.num_k_blocks / blocks)
    part = (segments, p.batch, p.heads, n_long * plan.block_q)
    is_long = torch.zeros(plan.num_q_blocks, dtype=torch.int32, device=q.device)
    is_long.scatter_(0, long_rows.long(), 1)
    split: dict[str, Any] = {
        "LONG_ROWS": long_rows,
        "IS_LONG": is_long,
        "long_blocks": blocks,
        "n_long": n_long,
    }
    part_o = q.new_empty(*part, v.shape[-1], dtype=torch.float32)
    part_lse = q.new_empty(part, dtype=torch.float32)
    launches: tuple[tuple[int, int, dict[str, Tensor], bool], ...] = (
        (1, plan.num_q_blocks * sub, {}, constants["WANT_LSE"]),
        (2, segments * n_long * sub, {"O": part_o, "LSE": part_lse}, True),
    )
    for mode, programs, outputs, with_lse in launches:
        run(
            Launch(
                forward_kernel,
                (programs, *heads_and_batch),
                {**arguments, **split, **outputs},
                {**constants, "SPLIT": mode, "WANT_LSE": with_lse},
                **options,
            )
        )
    run(
        Launch(
            merge_kernel,
            (n_long * sub, *heads_and_batch),
            {
                "PART_O": part_o,
                "PART_LSE": part_lse,
                "O": o,
                "LSE": lse,
                **{
                    name: arguments[name] for name in ("FULL_NUM", "PART_NUM", "Q_SIZES", "Q_ORDER")
                },
                **{name: split[name] for name in ("LONG_ROWS", "long_blocks", "n_long")},
                **{
                    name: arguments[name]
                    for name in ("q_len", "n_q", "list_b", "list_h", "order_h")
                },
                "n_segments": segments,
            },
            {name: constants[name] for name in ("VALUE_DIM", "DVP", "BLOCK_Q", "TQ", "WANT_LSE")},
            num_warps=8,
            num_stages=2,
        )
    )
    return o, lse, o_l, norm


def _fuses(q: Tensor, v: Tensor) -> bool:
    """Whether the linear branch runs inside the kernels; beyond head_dim 128 a D x Dv state does not fit."""
    return max(q.shape[-1], v.shape[-1]) <= 128


def _long_rows(
    plan: SparsePlan, programs: int, linear: Linear | None, shared_softmax: bool
) -> Tensor | None:
    """Row blocks that are split over several programs; None: no row gains by it."""
    if linear is not None or shared_softmax:
        return None
    widest = max(plan.kv_indices.shape[-1], plan.full_kv_indices.shape[-1])
    if widest * plan.block_k <= SPLIT_TOKENS:
        return None
    if plan.long_rows is not None:
        return plan.long_rows
    if programs >= FEW_PROGRAMS:
        return None
    return torch.arange(plan.num_q_blocks, dtype=torch.int32, device=plan.device)


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    grad_o_l: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    o: Tensor,
    lse: Tensor,
    o_l: Tensor,
    norm: Tensor,
    *,
    scale: float,
    shared_softmax: bool,
    linear: Linear | None,
    target: Target | None = None,
    run: Run = Launch.__call__,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    target = target or Target.of(q.device)
    if linear is not None and not _fuses(q, v):
        saved = (q, k, v, plan, o, lse, o_l, norm)
        grads = backward(
            grad_o,
            grad_lse,
            None,
            *saved,
            scale=scale,
            shared_softmax=shared_softmax,
            linear=None,
            target=target,
            run=run,
        )
        if grad_o_l is None:
            return grads
        more = torch_branch.backward(grad_o_l, q, k, v, plan, o_l, norm, linear)
        return grads[0] + more[0], grads[1] + more[1], grads[2] + more[2]
    p = _Problem(q, k, v, plan, scale, shared_softmax, linear, target, run)
    grad_o = grad_o.contiguous()
    delta, term = norm.new_empty(q.shape[:3]), torch.empty_like(norm)
    grad_q = q.new_empty(q.shape)
    if linear is not None:
        grad_o_l = torch.zeros_like(o) if grad_o_l is None else grad_o_l.contiguous()
    key_side = p.key_totals()
    shared = {
        "Q": q,
        "K": k,
        "V": v,
        "LSE": lse,
        "GRAD_O": grad_o,
        "DELTA": delta,
        "K_SIZES": p.k_sizes,
        "Q_SIZES": plan.q_block_sizes,
        "Q_ORDER": plan.q_order,
        **p.strides(),
        "scale": scale * LOG2E,
        "out_scale": scale,
    }
    branch = {
        "GRAD_O_L": grad_o_l if linear is not None else None,
        "NORM": norm if linear is not None else None,
        "TERM": term if linear is not None else None,
        "per_key": p.per_key,
        "n_keys": float(plan.kv_len),
    }
    constants, options = p.constants("rows")
    lists = p.lists(full=p.read[0], part=p.read[1], extra=p.extra)
    extra_keys = p.extra_key_arguments()
    run(
        Launch(
            rows_kernel,
            (plan.num_q_blocks * math.ceil(plan.block_q / constants["TQ"]), p.heads, p.batch),
            {
                **shared,
                **branch,
                "O": o,
                "GRAD_LSE": None if grad_lse is None else grad_lse.contiguous(),
                "GRAD_Q": grad_q,
                "O_L": o_l if linear is not None else None,
                **lists,
                **extra_keys,
                "COLUMN_NUM": p.column_counts(),
                **key_side,
                **p.rules(),
                "n_q": plan.num_q_blocks,
            },
            {**constants, **p.linear_constants(), "EXTRA_KEYS": p.extra_keys},
            **options,
        )
    )
    gathered = _gathered_gradients(p, shared, lists, extra_keys) if p.extra_keys else None
    # Columns are added to what the lists gave, so both stay in fp32 until then.
    grad_dtype = torch.float32 if p.extra_keys == 1 else k.dtype
    grad_k = k.new_empty(k.shape, dtype=grad_dtype)
    grad_v = v.new_empty(v.shape, dtype=grad_dtype)
    means = gathered if p.extra_keys == 2 else None
    if linear is not None:
        _linear_key_gradients(p, grad_k, grad_v, grad_o_l, norm, term)
    constants, options = p.constants("columns")
    full, partial = _transposed(plan)
    run(
        Launch(
            columns_kernel,
            (plan.num_k_blocks * math.ceil(plan.block_k / constants["TK"]), p.kv_heads, p.batch),
            {
                **shared,
                "GRAD_K": grad_k,
                "GRAD_V": grad_v,
                **p.lists(full=full, part=partial),
                "GRAD_CENTROID_K": None if means is None else means[0],
                "GRAD_CENTROID_V": None if means is None else means[1],
                **p.rules(),
            },
            {**constants, "ADD": linear is not None},
            **options,
        )
    )
    if p.extra_keys == 1:
        assert gathered is not None
        _add_columns(p, grad_k, gathered[0])
        _add_columns(p, grad_v, gathered[1])
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _linear_key_gradients(
    p: _Problem,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_o_l: Tensor | None,
    norm: Tensor,
    term: Tensor,
) -> None:
    """Writes the linear branch's share of grad_k and grad_v."""
    assert p.linear is not None
    assert grad_o_l is not None
    plan = p.plan
    phi_q, state, state_z = p.totals(
        p.q, grad_o_l, sizes=None, norm=norm, term=term, want_phi=p.mode >= 2
    )
    # Heads that share a key head add up.
    state, state_z = (x.unflatten(1, (p.kv_heads, -1)).sum(2) * p.per_key for x in (state, state_z))
    rows = None
    if p.mode >= 2:
        summed = plan.linear_blocks(p.linear.scope)
        rows = block_lists((summed if p.mode == 3 else ~summed).mT)
    constants, options = p.constants("linear_columns")
    for name in ("POSITIONAL", "WINDOW"):
        del constants[name]
    p.run(
        Launch(
            linear_columns_kernel,
            (plan.num_k_blocks * math.ceil(plan.block_k / constants["TK"]), p.kv_heads, p.batch),
            {
                "K": p.k,
                "V": p.v,
                "GRAD_K": grad_k,
                "GRAD_V": grad_v,
                **p.lists(row=rows),
                "K_SIZES": p.k_sizes,
                "Q_SIZES": plan.q_block_sizes,
                "Q_ORDER": plan.q_order,
                "PHI_Q": phi_q,
                "STATE": state.to(p.q.dtype).contiguous(),
                "STATE_Z": state_z.contiguous(),
                "GRAD_O_L": grad_o_l,
                "NORM": norm,
                "TERM": term,
                **{name: x for name, x in p.strides().items() if not name.startswith("q")},
                **{
                    name: x
                    for name, x in p.rules().items()
                    if name not in ("q_offset", "window", "sink")
                },
                "per_key": p.per_key,
                "n_keys": float(plan.kv_len),
            },
            {**constants, **p.linear_constants()},
            **options,
        )
    )


def _transposed(plan: SparsePlan) -> tuple[Lists, Lists | None]:
    """Query blocks that read each key block, in full and in part.

    Without positions there is no difference to a key: what is padding is masked once per tile.
    """
    if plan.positional:
        lists = plan.transpose()
        return lists.full, lists.partial
    return block_lists(plan.to_block_mask().mT), None


def _gathered_gradients(
    p: _Problem, shared: dict[str, Any], lists: dict[str, Any], extra_keys: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Gradients of the extra keys: means `[B, Hkv, T_k, D]`, columns `[B, Hq, C, D]`; fp32."""
    plan = p.plan
    constants, options = p.constants("columns")
    n = plan.num_k_blocks if p.extra_keys == 2 else extra_keys["n_columns"]
    tiles = math.ceil(n / constants["TK"])
    wanted = max(1, min(4, math.ceil(256 / (tiles * p.heads * p.batch))))
    span = math.ceil(plan.num_q_blocks / wanted)
    parts = math.ceil(plan.num_q_blocks / span)
    shape = (parts, p.batch, p.heads, n)
    grad_k = p.q.new_empty(*shape, p.head_dim, dtype=torch.float32)
    grad_v = p.q.new_empty(*shape, p.value_dim, dtype=torch.float32)
    p.run(
        Launch(
            gathered_kernel,
            (tiles * parts, p.heads, p.batch),
            {
                **shared,
                "GRAD_X_K": grad_k,
                "GRAD_X_V": grad_v,
                **extra_keys,
                **p.rules(),
                "n_q": plan.num_q_blocks,
                "span": span,
                "list_b": lists["list_b"],
                "list_h": lists["list_h"],
            },
            {**constants, "EXTRA_KEYS": p.extra_keys},
            **options,
        )
    )
    grad_k, grad_v = grad_k.sum(0), grad_v.sum(0)
    if p.extra_keys == 2:
        grad_k, grad_v = (
            x.unflatten(1, (p.kv_heads, -1)).sum(2).contiguous() for x in (grad_k, grad_v)
        )
    return grad_k, grad_v


def _add_columns(p: _Problem, grad: Tensor, of_columns: Tensor) -> None:
    """Adds `[B, Hq, C, D]` to the keys `[B, Hkv, Lk, D]` they belong to, one query head at a time.

    The columns of one head are distinct keys, so no two additions meet and the order is fixed.
    """
    assert p.columns is not None
    columns = p.columns.expand(p.batch, p.heads, -1).long()
    valid = columns < p.plan.kv_len
    index = columns.clamp(max=p.plan.kv_len - 1)[..., None].expand_as(of_columns)
    values = of_columns.masked_fill(~valid[..., None], 0.0)
    group = p.heads // p.kv_heads
    for g in range(group):
        grad.scatter_add_(2, index[:, g::group], values[:, g::group])


def _lead(x: Tensor, lead: torch.Size) -> Tensor:
    """`x` with its two leading sizes broadcast to `lead`."""
    return x.expand(*lead, *x.shape[2:]).contiguous()
