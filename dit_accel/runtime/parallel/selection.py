"""`SharedTokens`: tokens of a call that run in this process."""

from typing import Any

import torch
from torch import Tensor

from dit_accel.models import AllTokens, Call, TokenSelection
from dit_accel.runtime.parallel.exchange import Exchange
from dit_accel.runtime.parallel.group import Group


class SharedTokens(TokenSelection):
    """This process's share of the tokens of another selection.

    Args:
        inner: selection of a method; None: all tokens in raster order.
        group: processes that split the tokens.
        layouts: layouts of the layers, see `AttentionLayer.layout`.
    """

    def __init__(self, inner: TokenSelection | None, group: Group, layouts: set[str]) -> None:
        self.inner = inner or AllTokens()
        self.group = group
        self.exchanges = {layout: Exchange(group) for layout in {"image", *layouts}}

    def begin_call(self, call: Call) -> None:
        """Begin a call, after all methods have begun it."""
        if isinstance(self.inner, AllTokens):
            self.inner.call = call
            self.inner._kept = {}

    @property
    def call(self) -> Call:  # type: ignore[override]
        return self.inner.call

    @property
    def index(self) -> Tensor | None:  # type: ignore[override]
        return self.inner.index

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return self.inner.keeps

    @property
    def passes(self) -> bool:
        return False

    @property
    def per_run(self) -> dict[str, Any]:
        return self.inner.per_run

    @property
    def per_context(self) -> dict[str, Any]:
        return self.inner.per_context

    def take(self, x: Tensor) -> Tensor:
        tokens = self.inner.take(x)
        if tokens.shape[1] < self.group.size:  # not every module accepts an empty sequence
            raise ValueError(
                f"{tokens.shape[1]} image tokens run in this call, in {self.group.size} processes; accepted is one or "
                "more for each process"
            )
        return self.part(tokens, "image")

    def part(self, x: Tensor, layout: str = "text") -> Tensor:
        length = x.shape[1]
        if layout == "text":
            for exchange in self.exchanges.values():
                if exchange.text_tokens != length:
                    exchange.text = x.new_empty(length, 0)
        elif self.exchanges[layout].tokens.shape[0] != length:
            self.exchanges[layout].tokens = x.new_empty(length, 0)
        # A contiguous copy: blocks were compiled for contiguous strides, and a view would keep the whole sequence alive.
        return x[:, self.group.own(length)].clone(memory_format=torch.contiguous_format)

    def whole(self, x: Tensor, layout: str = "image", *, ends: bool = False) -> Tensor:
        return self.group.gather(x, self.exchanges[layout].tokens.shape[0], ends=ends)

    def fill(self, x: Tensor) -> Tensor:
        return self.inner.fill(x)

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        return self.inner.place(layout, length, offsets)
