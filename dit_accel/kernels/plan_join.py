"""`join_heads`: join of several plans, each for some heads of a layer, into one plan."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.kernels.lists import prefix_lists
from dit_accel.kernels.plan import PER_HEAD, SparsePlan

EQUAL = ("block_q", "block_k", "q_len", "kv_len", "causal", "q_offset", "window", "sink")
"""Fields that must be equal in all plans."""
ABSENT = ("kv_lengths", "q_block_sizes", "k_block_sizes", "skip_num_blocks")
"""Fields that must be None in all plans."""


def join_heads(plans: Sequence[SparsePlan], heads: Sequence[Sequence[int]]) -> SparsePlan:
    """Return one plan for all heads of a layer, so that one kernel call computes all of them.

    Args:
        plans: at least one plan, all with the same lengths, blocks and rules. A plan with one set of lists uses it for all
            of its heads.
        heads: head indices of each plan, in the order of its lists. Together they are the numbers 0 to n - 1, each once.

    Raises:
        ValueError: rules differ, or the head indices are not complete.
    """
    order = [h for some in heads for h in some]
    if len(plans) != len(heads) or not plans or sorted(order) != list(range(len(order))):
        raise ValueError(
            f"heads={[list(x) for x in heads]}: accepted are one list for each of the {len(plans)} plans, together the "
            "numbers from 0 on, each once"
        )
    first = plans[0]
    for plan in plans:
        for name in EQUAL:
            if getattr(plan, name) != getattr(first, name):
                raise ValueError(
                    f"plans: {name}={getattr(plan, name)} and {name}={getattr(first, name)}; accepted are equal values"
                )
        for name in ABSENT:
            if getattr(plan, name) is not None:
                raise ValueError(f"plans: one has {name}; accepted are plans without it")
    # All lists are written out, because the width of the joined lists determines which rows need no list.
    plans = [plan.listed() for plan in plans]
    counts = [len(x) for x in heads]
    # Positions of the heads 0, 1, ... in the concatenation of the plans.
    back = torch.tensor(order, device=first.device).argsort()
    changes: dict[str, Tensor | None] = {"long_rows": _long_rows(plans)}
    for name in PER_HEAD:
        parts = [getattr(plan, name) for plan in plans]
        if all(x is None for x in parts):
            continue
        if name == "q_order":
            in_order = torch.arange(first.q_len, dtype=torch.int32, device=first.device)
            filled = [in_order[None] if x is None else x for x in parts]
            joined = torch.cat([x.expand(n, -1) for x, n in zip(filled, counts, strict=True)])
            changes[name] = joined[back].contiguous()
        elif name == "columns":
            none = torch.empty(1, 1, 0, dtype=torch.int32, device=first.device)
            filled = [none if x is None else x for x in parts]
            changes[name] = _joined(filled, counts, first.kv_len, back)
        elif name.endswith("indices"):
            changes[name] = _joined(parts, counts, 0, back)
        else:  # counts, whose last axis is the same in all plans
            changes[name] = _joined(parts, counts, None, back)
    plan = dataclasses.replace(first, **changes, row_bound=None)  # type: ignore[arg-type]
    if plan.long_rows is None:
        return plan
    full = prefix_lists(plan.full_blocks(), plan.long_rows, None)
    return dataclasses.replace(plan, full_kv_num_blocks=full.counts, full_kv_indices=full.indices)


def _joined(
    parts: Sequence[Tensor], counts: Sequence[int], filler: int | None, back: Tensor
) -> Tensor:
    """Return the tensors concatenated along the heads, in the order of the heads, with a padded last axis if it may differ."""
    batch, width = (max(x.shape[axis] for x in parts) for axis in (0, -1))
    out = []
    for x, heads in zip(parts, counts, strict=True):
        if filler is not None:
            x = pad(x, (0, width - x.shape[-1]), value=filler)
        out.append(x.expand(batch, heads, *x.shape[2:]))
    return torch.cat(out, 1)[:, back].contiguous()


def _long_rows(plans: Sequence[SparsePlan]) -> Tensor | None:
    """Return the query blocks that are long in at least one plan."""
    given = [x.long_rows for x in plans if x.long_rows is not None]
    if not given or all(x is given[0] or torch.equal(x, given[0]) for x in given):
        return given[0] if given else None
    return torch.cat(given).unique().int()
