"""`Quest`: queries read the pages with the largest upper bounds of the scores (Quest, arXiv 2406.10774)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dit_accel.llm.kvcache.budget import check_budget, check_count, tokens_of
from dit_accel.llm.kvcache.chosen import attend_chosen
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import SCORES, Partial
from dit_accel.llm.kvcache.selector import PromptQueries, Selector
from dit_accel.llm.kvcache.store import Store


@dataclass
class Quest(Selector):
    """Selector that reads the pages of tokens with the largest upper bounds of their scores.

    Each page stores the minimum and the maximum of each key channel. They bound the score of every key in the page:
    `q k <= sum max(q min, q max)`. Query heads that share keys read the same pages: the bounds of each head are turned into
    weights by a softmax over pages, and the weights are summed over the heads.

    After a crop, the bounds of the last page may be wider than necessary, but they remain valid.
    """

    name: ClassVar[str] = "quest"
    budget: float | int = 0.1
    """Tokens that a query reads: a share (float) of the stored tokens, or a number (int). Rounded up to whole pages."""
    page: int = 16
    """Number of tokens per page."""
    low: Float[Tensor, "b h pages d"] | None = field(default=None, init=False, repr=False)
    """Minimum of each channel in each page; inf for a page without real tokens."""
    high: Float[Tensor, "b h pages d"] | None = field(default=None, init=False, repr=False)
    """Maximum of each channel in each page; -inf for a page without real tokens."""

    def __post_init__(self) -> None:
        check_budget("budget", self.budget)
        check_count("page", self.page)

    def append(self, store: Store, part: Part, prompt: PromptQueries | None, scale: float) -> None:
        before = store.slots % self.page
        store.append(part)
        padding = (0, 0, before, -(before + part.slots) % self.page)
        hidden = None if part.valid is None else ~part.valid[..., None]

        def pages(value: float) -> Tensor:
            k = part.k if hidden is None else part.k.masked_fill(hidden, value)
            return functional.pad(k, padding, value=value).unflatten(2, (-1, self.page))

        low, high = pages(math.inf).amin(3), pages(-math.inf).amax(3)
        if self.low is not None and self.high is not None:
            if before:
                low[:, :, 0] = torch.minimum(low[:, :, 0], self.low[:, :, -1])
                high[:, :, 0] = torch.maximum(high[:, :, 0], self.high[:, :, -1])
            whole = self.low.shape[2] - (before > 0)
            low = torch.cat([self.low[:, :, :whole], low], 2)
            high = torch.cat([self.high[:, :, :whole], high], 2)
        self.low, self.high = low, high

    def attend(self, store: Store, q: Tensor, scale: float) -> tuple[list[Partial], float]:
        total = -(-store.slots // self.page)
        count = tokens_of(self.budget, total * self.page, self.page) // self.page
        if self.reads_all(count, total):
            return [store.attend(q, scale)], 1.0
        pages = self._pages(q, count, scale)
        slots = pages[..., None] * self.page + torch.arange(self.page, device=pages.device)
        slots = slots.flatten(3)
        inside = slots < store.slots
        found = attend_chosen(store, q, slots.clamp(max=store.slots - 1), inside, scale)
        return [found], min(1.0, count * self.page / store.slots)

    @staticmethod
    def reads_all(count: int, total: int) -> bool:
        """Return whether the budget covers all pages, so that selection can be skipped."""
        return count >= total

    def _pages(
        self, q: Float[Tensor, "b h g l_q d"], count: int, scale: float
    ) -> Int[Tensor, "b h l_q n"]:
        """Return the pages that each query position reads."""
        assert self.low is not None
        assert self.high is not None
        empty = self.low[..., 0] > self.high[..., 0]
        low, high = (x.masked_fill(empty[..., None], 0.0) for x in (self.low, self.high))
        rows, heads, group, length, _ = q.shape
        step = max(1, SCORES // (rows * heads * group * low.shape[2]))
        found = []
        for start in range(0, length, step):
            some = q[:, :, :, start : start + step]
            flat = some.flatten(2, 3)
            bound = flat.clamp(min=0) @ high.mT + flat.clamp(max=0) @ low.mT
            bound = (bound.float() * scale).masked_fill(empty[:, :, None], torch.finfo().min)
            weights = bound.softmax(-1).unflatten(2, some.shape[2:4]).sum(2)
            weights = weights.masked_fill(empty[:, :, None], -1.0)
            found.append(weights.topk(count, dim=-1).indices)
        return torch.cat(found, 2)

    def crop(self, store: Store, count: int) -> Part | None:
        rest = store.crop(count)
        pages = -(-store.slots // self.page)
        if self.low is not None and self.high is not None:
            self.low, self.high = self.low[:, :, :pages], self.high[:, :, :pages]
        return rest

    def rows(self, index: Int[Tensor, " n"]) -> None:
        if self.low is not None and self.high is not None:
            at = index.to(self.low.device)
            self.low, self.high = self.low.index_select(0, at), self.high.index_select(0, at)

    def clear(self) -> None:
        self.low = self.high = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.low, self.high) if x is not None)
