"""`SnapKV`: keeps the prompt tokens that the last queries of the prompt attend to (SnapKV, arXiv 2404.14469)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dit_accel.llm.kvcache.budget import check_budget, check_count, tokens_of
from dit_accel.llm.kvcache.part import Part, hidden, joined
from dit_accel.llm.kvcache.partial import Partial
from dit_accel.llm.kvcache.selector import PromptQueries, Selector
from dit_accel.llm.kvcache.store import Store


@dataclass
class SnapKV(Selector):
    """Selector that drops prompt tokens with little attention from the last queries of the prompt.

    Each KV head keeps different tokens. Tokens after the prompt are all kept. Dropped tokens are lost for later questions.
    If a prompt is processed in chunks, the first chunk counts as the prompt.
    """

    name: ClassVar[str] = "snapkv"
    forgets: ClassVar[bool] = True
    budget: float | int = 0.1
    """Tokens that each head keeps: a share (float) of the stored tokens, or a number (int)."""
    window: int = 64
    """Number of last queries of the prompt whose attention is used."""
    kernel: int = 7
    """Odd width of the max pooling over tokens, which also keeps the neighbours of important tokens."""
    positions: Int[Tensor, "b h kept"] | None = field(default=None, init=False, repr=False)
    """Index of each kept token among the appended prompt tokens."""
    prompt: int = field(default=0, init=False, repr=False)
    """Number of appended prompt tokens, kept or dropped, without cropped ones."""
    later: int = field(default=0, init=False, repr=False)
    """Number of tokens after the prompt."""
    kept: float = field(default=0.0, init=False, repr=False)
    """Mean number of kept prompt tokens over rows and heads."""

    def __post_init__(self) -> None:
        check_budget("budget", self.budget)
        check_count("window", self.window)
        check_count("kernel", self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: must be an odd int")

    def append(self, store: Store, part: Part, prompt: PromptQueries | None, scale: float) -> None:
        if prompt is None:
            store.append(part)
            self.later += part.slots
            return
        count = tokens_of(self.budget, part.slots, store.granule)
        scores = self._scores(part, prompt, scale)
        positions = scores.topk(count, dim=-1).indices.sort(dim=-1).values
        store.append(part.take(positions))
        self.positions, self.prompt, self.kept = positions, part.slots, float(count)

    def _scores(self, part: Part, prompt: PromptQueries, scale: float) -> Float[Tensor, "b h n"]:
        """Return the pooled attention of the last queries to each token of a part."""
        whole = joined(joined(prompt.first, part), prompt.last)
        start, window = prompt.first.slots, min(self.window, prompt.q.shape[3])
        slots = torch.arange(whole.slots, device=part.k.device)
        hidden = slots > slots[-window:, None]
        found = []
        for head in range(part.k.shape[1]):  # one head at a time to limit memory
            q, k = prompt.q[:, head, :, -window:], whole.k[:, None, head]
            scores = (q @ k.mT).float() * scale  # [B, g, window, n]
            low = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(hidden, low)
            if whole.valid is not None:
                scores = scores.masked_fill(~whole.valid[:, :, None], low)
            weights = scores.softmax(-1)
            if whole.valid is not None:
                weights = weights * whole.valid[:, 0, -window:][:, None, :, None]
            received = weights.sum(2)[..., start : start + part.slots]
            pooled = functional.max_pool1d(received, self.kernel, 1, self.kernel // 2)
            found.append(pooled.sum(1))
        scores = torch.stack(found, 1)
        return scores if part.valid is None else scores.masked_fill(~part.valid, -1.0)

    def attend(self, store: Store, q: Tensor, scale: float) -> tuple[list[Partial], float]:
        if not store.slots:
            return [], 0.0
        return [store.attend(q, scale)], (self.kept + self.later) / (self.prompt + self.later)

    def crop(self, store: Store, count: int) -> Part | None:
        if count <= self.later:
            rest = store.crop(count)
            self.later -= count + (0 if rest is None else rest.slots)
            return rest
        store.crop(self.later)
        self.prompt, self.later = self.prompt - (count - self.later), 0
        if not self.prompt or self.positions is None:
            store.clear()
            self.clear()
            return None
        gone = self.positions >= self.prompt
        store.parts = hidden(store.parts, gone)
        self.kept = float((~gone).sum(-1).double().mean())
        return None

    def rows(self, index: Int[Tensor, " n"]) -> None:
        if self.positions is not None:
            self.positions = self.positions.index_select(0, index.to(self.positions.device))

    def clear(self) -> None:
        self.positions, self.prompt, self.later, self.kept = None, 0, 0, 0.0

    @property
    def nbytes(self) -> int:
        return 0 if self.positions is None else self.positions.nbytes
