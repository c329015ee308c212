"""`ByHead`: a separate pattern for each head or each group of heads that share keys, in one plan for the layer."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.config.base import check, check_choice, suggest
from dit_accel.config.prefill import DENSE
from dit_accel.kernels import SparsePlan
from dit_accel.kernels.plan_join import join_heads
from dit_accel.llm.prefill.pattern import Pattern, Prompt, kind_of, pattern_names, pattern_of


@dataclass(frozen=True)
class ByHead(Pattern):
    """Pattern that applies a separate pattern to each head.

    Each pattern plans all of its heads at once. The plans are joined, so that one kernel call computes the layer.
    """

    name: ClassVar[str] = "by_head"
    alone: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    heads: tuple[str, ...] | list[str] = ()
    """Pattern of each head: a key of `choices`, the name of a pattern (with its default options), or "dense"."""
    choices: dict[str, Any] = field(default_factory=dict)
    """Patterns with options by names of your choice: {"wide": {"pattern": "hybrid", "options": {"top_p": 0.95}}}."""
    by: str = "head"
    """An entry of `heads` is for one query "head", or for a "group" of query heads that share keys."""

    def __post_init__(self) -> None:
        ok = isinstance(self.heads, list | tuple) and len(self.heads) > 0
        ok = ok and all(isinstance(x, str) for x in self.heads)
        check("heads", self.heads, ok, "a list with the name of a pattern for each head")
        check("choices", self.choices, isinstance(self.choices, dict), "a mapping of names")
        check_choice("by", self.by, ("head", "group"))
        object.__setattr__(self, "heads", tuple(self.heads))
        patterns = {name: _pattern(name, value) for name, value in self.choices.items()}
        for name in self.heads:
            if name not in patterns:
                known = [*self.choices, DENSE, *pattern_names()]
                if name not in known:
                    raise ValueError(
                        f"heads: {name!r} is not in choices and not a pattern{suggest(name, known)}; must be one of "
                        f"{', '.join(known)}"
                    )
                patterns[name] = _pattern(name, name)
        object.__setattr__(self, "_patterns", patterns)

    def check_heads(self, heads: int, kv_heads: int) -> None:
        wanted, what = (heads, "query heads") if self.by == "head" else (kv_heads, "KV heads")
        if len(self.heads) != wanted:
            raise ValueError(
                f"by_head: heads has {len(self.heads)} entries, but the model has {wanted} {what}; must have {wanted} "
                f"entries with by={self.by!r}"
            )

    def plan(self, prompt: Prompt) -> SparsePlan:
        heads, kv_heads = prompt.q.shape[1], prompt.k.shape[1]
        self.check_heads(heads, kv_heads)
        group = heads // kv_heads
        plans, entries, queries = [], [], []
        for name in dict.fromkeys(self.heads):
            own = [i for i, x in enumerate(self.heads) if x == name]
            entries.append(own)
            if self.by == "group":
                own = [i * group + j for i in own for j in range(group)]
            queries.append(own)
            pattern: Pattern | None = vars(self)["_patterns"][name]
            plans.append(_dense(prompt) if pattern is None else pattern.plan(_some(prompt, own)))
        if self.by == "group" and all(
            x.heads in (1, len(own)) and x.q_order is None
            for x, own in zip(plans, entries, strict=True)
        ):
            return join_heads(plans, entries)  # the query heads of a group share their lists
        expanded = [x.for_heads(len(own)) for x, own in zip(plans, queries, strict=True)]
        return join_heads(expanded, queries)


def _pattern(name: str, value: Any) -> Pattern | None:
    """Return the pattern for a value of `choices`; None for dense."""
    ok = isinstance(name, str) and isinstance(value, str | dict)
    if isinstance(value, dict):
        ok = isinstance(value.get("pattern"), str) and set(value) <= {"pattern", "options"}
        ok = ok and isinstance(value.get("options", {}), dict)
    check(f"choices[{name!r}]", value, ok, "the name of a pattern, or a mapping with pattern and options")  # fmt: skip
    pattern, options = (
        (value, {}) if isinstance(value, str) else (value["pattern"], value.get("options", {}))
    )
    if pattern == DENSE:
        return None
    if not kind_of(pattern).joins:
        accepted = ", ".join(x for x in pattern_names() if kind_of(x).joins)
        raise ValueError(
            f"choices[{name!r}]: {pattern} applies to all heads of a layer; for single heads it must be one of {accepted}, "
            f"{DENSE}"
        )
    try:
        return pattern_of(pattern, options)
    except ValueError as error:
        raise ValueError(f"choices[{name!r}]: {error}") from None


def _dense(prompt: Prompt) -> SparsePlan:
    """Return a plan that reads every key."""
    shape = 1, 1, prompt.num_q_blocks, prompt.num_k_blocks
    every = torch.ones(shape, dtype=torch.bool, device=prompt.q.device)
    return SparsePlan.from_block_mask(every, **prompt.rules)


def _some(prompt: Prompt, heads: list[int]) -> Prompt:
    """Return the call for a subset of query heads. Keys are repeated if the heads are not complete groups."""
    group = prompt.q.shape[1] // prompt.k.shape[1]
    whole = sorted({h // group for h in heads})
    keys = whole if len(heads) == len(whole) * group else [h // group for h in heads]
    return dataclasses.replace(prompt, q=_picked(prompt.q, heads), k=_picked(prompt.k, keys))


def _picked(x: Tensor, heads: list[int]) -> Tensor:
    """Return a subset of the heads of `[B, H, L, D]`; a view if they are adjacent."""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return x[:, heads[0] : heads[-1] + 1]
    return x[:, heads]
