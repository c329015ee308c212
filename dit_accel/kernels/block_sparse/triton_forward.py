"""Forward pass of the Triton backend: its kernels, their arguments and their order.

No function waits for the device or depends on numbers in tensors, so calls can be captured in a CUDA graph. The argument
`run` is called with each launch. It runs the launch, or collects it for compilation.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.forward import forward_kernel, merge_kernel
from dit_accel.kernels.block_sparse.problem import Problem, Run
from dit_accel.kernels.block_sparse.tiles import Target, multiplies_from_memory, pad
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.linear import torch_branch
from dit_accel.kernels.linear.mix import Mix, mixed
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.plan import SparsePlan

LOG2E = math.log2(math.e)
# A row with more keys is split over several programs if there are few programs, or if it is one of the plan's `long_rows`.
SPLIT_TOKENS = 4096
FEW_PROGRAMS = 128
# Largest size of the partial results of split rows. Longer rows get longer segments.
PART_BYTES = 2**26


def fuses(q: Tensor, v: Tensor) -> bool:
    """Return whether the linear branch runs inside the kernels. Above head_dim 128 a D x Dv state does not fit."""
    return max(q.shape[-1], v.shape[-1]) <= 128


def _mixes(q: Tensor, v: Tensor, mix: Mix, linear: Linear, target: Target) -> bool:
    """Return whether the forward kernel applies `mix`.

    If matrix instructions take both operands from registers, or head_dim is padded, a projection at the end of the
    kernel causes spills in its loops. With the scope "all" the totals are projected instead.
    """
    if not fuses(q, v):
        return False
    if mix.proj_weight is None or linear.scope == "all" or target.backend == "interpreter":
        return True
    whole = pad(q.shape[-1]) == q.shape[-1] and pad(v.shape[-1]) == v.shape[-1]
    return whole and multiplies_from_memory(target)


def packed_heads(p: Problem) -> int:
    """Return the number of query heads that one program of the forward kernel computes. 1: heads are not packed.

    Query heads are packed if the heads of a group have the same lists (the plan has one set of lists for each key
    head, or one for all) and a tile has enough rows for a number of heads that divides the group. This works with
    columns, block means, split rows and all rules of a plan. Calls with a linear branch are not packed, because its sums
    occupy the registers.
    """
    group = p.heads // p.kv_heads
    if group == 1 or p.linear is not None or p.plan.heads not in (1, p.kv_heads):
        return 1
    for heads in range(group, 1, -1):
        if group % heads == 0 and heads * p.plan.block_q <= p.tile("forward", heads).q:
            return heads
    return 1


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
    mix: Mix | None = None,
    target: Target | None = None,
    run: Run = Launch.__call__,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `o, lse, o_l, norm`.

    `lse` is empty without `want_lse`; `o_l` and `norm` are empty without a linear branch. With `mix`, `o` is the mixed
    result, and `o_l` and `norm` are empty.
    """
    target = target or Target.of(q.device)
    options: dict[str, Any] = {"scale": scale, "want_lse": want_lse, "target": target, "run": run}
    if mix is not None and linear is not None and not _mixes(q, v, mix, linear, target):
        o, lse, o_l, _ = forward(
            q, k, v, plan, shared_softmax=shared_softmax, linear=linear, **options
        )
        o = mixed(o, o_l, mix, plan, linear.scope)
        return o, lse, q.new_empty(0), q.new_empty(0, dtype=torch.float32)
    if linear is not None and not fuses(q, v):
        o, lse, _, _ = forward(q, k, v, plan, shared_softmax=shared_softmax, linear=None, **options)
        return o, lse, *torch_branch.forward(q, k, v, plan, linear)
    p = Problem(q, k, v, plan, shared_softmax, linear, target, run)
    branch = linear is not None and mix is None
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    rows = q.shape[:3]
    lse = q.new_empty(rows if want_lse else (0,), dtype=torch.float32)
    o_l = q.new_empty(o.shape if branch else (0,))
    norm = q.new_empty(rows if branch else (0,), dtype=torch.float32)
    mode, mix_arguments = _mix(p, mix)
    projected = mix.proj_weight if mix is not None and mode == 1 else None
    packed = packed_heads(p)
    constants, launch_options = p.constants("forward", packed)
    constants |= {
        **p.linear_constants(),
        "EXTRA_KEYS": p.extra_keys,
        "MIX": mode,
        "SPLIT": False,
        "PREFIX": plan.has_prefix_rows,
        "WANT_LSE": want_lse,
        "FLIP": scale < 0,
        "HEADS_PACKED": packed,
    }
    arguments: dict[str, Any] = {
        "Q": q,
        "K": k,
        "V": v,
        "O": o,
        "LSE": lse,
        "O_L": o_l,
        "NORM": norm,
        **p.row_lists(),
        **p.extra_key_arguments(),
        "COLUMN_NUM": p.column_counts(),
        **p.key_totals(projected),
        **mix_arguments,
        **p.strides,
        **p.rules(),
        # Number of query heads that share a set of lists. If all heads share one, list_h is 0.
        "list_group": p.heads // plan.heads if plan.heads > 1 else 1,
        "n_q": plan.num_q_blocks,
        "scale": abs(scale) * LOG2E,
        "n_keys": float(plan.kv_len),
        "LONG_ROWS": None,
        "IS_LONG": None,
        "PART_O": None,
        "PART_LSE": None,
        "long_blocks": 0,
        "n_long": 1,
        "n_segments": 0,
    }
    sub = math.ceil(plan.block_q / constants["TQ"])
    grid = (plan.num_q_blocks * sub, p.heads // packed, p.batch)
    long_rows = None
    if linear is None and not shared_softmax:
        long_rows = _long_rows(p, math.prod(grid))
    if long_rows is None:
        run(Launch(forward_kernel, grid, arguments, constants, **launch_options))
    else:
        _split(p, long_rows, grid, sub, arguments, constants, launch_options)
    return o, lse, o_l, norm


def _mix(p: Problem, mix: Mix | None) -> tuple[int, dict[str, Any]]:
    """Return MIX of the forward kernel, and its arguments."""
    arguments: dict[str, Any] = dict.fromkeys(("PROJ_W", "PROJ_B", "ALPHA", "FILLED"))
    arguments |= {"alpha_b": 0, "alpha_h": 0, "alpha_q": 0}
    if mix is None:
        return 0, arguments
    if mix.alpha is None:
        bias = None if mix.proj_bias is None else mix.proj_bias.contiguous()
        arguments["PROJ_B"] = bias
        if p.mode == 1:
            return 1, arguments
        assert mix.proj_weight is not None
        weight = mix.proj_weight.to(p.q.dtype).contiguous()  # an fp32 weight would cause spills
        return 2, arguments | {"PROJ_W": weight}
    alpha = mix.alpha
    strides = alpha.stride() if alpha.ndim == 3 else (0, alpha.stride(0), 0)
    arguments |= {
        "ALPHA": alpha,
        "alpha_b": strides[0] if len(alpha) > 1 and alpha.ndim == 3 else 0,
        "alpha_h": strides[1],
        "alpha_q": strides[2],
    }
    if p.plan.k_block_sizes is not None:  # blocks before the last key may be empty
        filled = (p.plan.k_sizes() > 0).sum(-1, dtype=torch.int32)
        arguments["FILLED"] = filled.expand(p.batch).contiguous()
    return 3, arguments


def _long_rows(p: Problem, programs: int) -> Tensor | None:
    """Return the query blocks to split over several programs, or None for no split.

    Args:
        programs: number of programs without splitting.
    """
    plan = p.plan
    widest = max(plan.kv_indices.shape[-1], plan.full_kv_indices.shape[-1])
    if plan.has_prefix_rows:
        widest = plan.num_k_blocks
    if widest * plan.block_k <= SPLIT_TOKENS:
        return None
    rows = plan.long_rows
    if rows is None:
        if programs >= FEW_PROGRAMS:
            return None
        rows = torch.arange(plan.num_q_blocks, dtype=torch.int32, device=plan.device)
    # With this number of rows, a device is busy without a split.
    return rows if len(rows) and _most_segments(p, len(rows)) > 1 else None


def _most_segments(p: Problem, n_long: int) -> int:
    rows = p.batch * p.heads * n_long * p.plan.block_q
    return PART_BYTES // (4 * rows * p.value_dim)


def _split(
    p: Problem,
    long_rows: Tensor,
    grid: tuple[int, int, int],
    sub: int,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Launch the kernel on short rows and segments of long rows, then the merge of the segments.

    Args:
        grid: grid of the launch without splitting.
        sub: number of programs of one query block.
    """
    plan, q = p.plan, p.q
    n_long = len(long_rows)
    least = math.ceil(plan.num_k_blocks / _most_segments(p, n_long))
    blocks = max(1, SPLIT_TOKENS // plan.block_k, least)
    segments = math.ceil(plan.num_k_blocks / blocks)
    part = (segments, p.batch, p.heads, n_long * plan.block_q)
    is_long = torch.zeros(plan.num_q_blocks, dtype=torch.int32, device=q.device)
    is_long.scatter_(0, long_rows.long(), 1)
    arguments |= {
        "LONG_ROWS": long_rows,
        "IS_LONG": is_long,
        "PART_O": q.new_empty(*part, p.value_dim, dtype=torch.float32),
        "PART_LSE": q.new_empty(part, dtype=torch.float32),
        "long_blocks": blocks,
        "n_long": n_long,
        "n_segments": segments,
    }
    grid = (segments * n_long * sub + grid[0], *grid[1:])
    p.run(Launch(forward_kernel, grid, arguments, {**constants, "SPLIT": True}, **options))
    copied = [
        "O",
        "LSE",
        "FULL_NUM",
        "PART_NUM",
        "LONG_ROWS",
        "Q_SIZES",
        "Q_ORDER",
        "q_len",
        "n_q",
        "list_b",
        "list_h",
        "list_group",
        "order_h",
        "long_blocks",
        "n_long",
        "PART_O",
        "PART_LSE",
        "n_segments",
    ]
    merged = {name: constants[name] for name in ("VALUE_DIM", "DVP", "BLOCK_Q", "WANT_LSE")}
    p.run(
        Launch(
            merge_kernel,
            (n_long * sub, p.heads, p.batch),  # one program per head
            {name: arguments[name] for name in copied},
            {**merged, "TQ": min(constants["TQ"], pad(plan.block_q))},
            num_warps=8,
            num_stages=2,
        )
    )
