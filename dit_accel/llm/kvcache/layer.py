"""`ZoneLayer`: one layer of a cache, in which the first and the last tokens are exact and those between are stored."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dit_accel.llm.kvcache.beside import Beside
from dit_accel.llm.kvcache.part import Part, joined
from dit_accel.llm.kvcache.partial import attention_part, grouped, merged
from dit_accel.llm.kvcache.selector import Prompt, Selector
from dit_accel.llm.kvcache.store import Store

TAG = "_dit_accel_layer"
"""Attribute of new keys that tells the attention function which layer holds the others."""
NOT_READ = (
    "past_key_values: the attention function of the model does not read this cache; accepted is a model after "
    "dit_accel.llm.enable(model, kv=...)"
)


def check_cached(
    mask: Tensor | None, *, causal: bool, softcap: float | None, dropout: float
) -> None:
    """Check that a call of a model can go through a `ZoneLayer`.

    Raises:
        ValueError: it needs what such layers do not have.
    """
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask: a mask of pairs {tuple(mask.shape)}; a KV cache accepts masks of real tokens [B, L]"
        )
    for name, wrong in (
        ("is_causal=False", not causal),
        ("softcap", softcap),
        ("dropout", dropout),
    ):
        if wrong:
            raise ValueError(f"{name}: accepted with kv= are causal models without it")


class ZoneLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    The first `sink` and the last tokens of a row are kept as they are: attention to them is strong, and errors there
    cost most. Tokens between them go through a selector into a store. Attention over both is exact where the store is.

    Args:
        store: see `Store`.
        selector: see `Selector`.
        sink: first tokens of each row that stay exact. Padding on the left does not count.
        recent: last tokens that stay exact, at least.
        flush: tokens that are stored at a time.
        overlap: whether a GPU stores tokens that come after the prompt beside the next layers.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        store: Store,
        selector: Selector,
        *,
        sink: int,
        recent: int,
        flush: int,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        self.store, self.selector = store, selector
        self.sink, self.recent, self.flush = sink, recent, flush
        self.beside = Beside(overlap)
        self.is_croppable = not selector.forgets
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.exact: Part | None = None
        """First tokens, then last ones."""
        self.length = 0
        self.sinks = 0
        """First slots of `exact` that stay there."""
        self.positions: Int[Tensor, "b sinks"] | None = None
        """Positions of the first slots, where rows have padding on the left."""
        self.stored = 0
        """Tokens that were handed to the selector."""
        self.calls = 0
        """Calls that found tokens in the cache."""
        self.read = 0.0
        """Shares of the tokens that these calls read, added up."""
        self.pending = False
        """Whether new keys were handed out that no attention function has read yet."""
        self.store.clear()
        self.selector.clear()
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values; `attend` takes them in."""
        if self.pending:
            self.pending = False  # what was not taken in is forgotten, and nothing else
            raise ValueError(NOT_READ)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = True
        key_states = key_states.view_as(
            key_states
        )  # the tag must not stay on the model's own tensor
        setattr(key_states, TAG, self)
        return key_states, value_states

    def attend(
        self,
        q: Float[Tensor, "b h_q l_q d"],
        k: Float[Tensor, "b h_kv l_q d"],
        v: Float[Tensor, "b h_kv l_q d_v"],
        mask: Bool[Tensor, "b l"] | None,
        *,
        scale: float,
        prompt: Callable[[], Tensor],
    ) -> Float[Tensor, "b h_q l_q d_v"]:
        """Return the attention output of new tokens, and take them in.

        Args:
            q, k, v: of the new tokens.
            mask: real tokens of the whole length; None: all.
            scale: factor of the dot products.
            prompt: attention among the tokens of a call that finds the cache empty.
        """
        self.beside.wait()
        past, length = self.length, self.length + k.shape[2]
        valid = None if mask is None else mask[:, None, past:length]
        positions = self._positions(mask, past, k) if self.store.needs_positions else None
        new = Part.of(k, v, valid, positions)
        rows = grouped(q, k.shape[1])
        if past == 0:
            out = prompt()
            if new.valid is not None:
                new = self._sinks_first(new)
            self.exact = new.own()
        else:
            self.exact = joined(self.exact, new)
            parts = [
                attention_part(
                    rows,
                    self.exact.k,
                    self.exact.v,
                    scale=scale,
                    visible=self.exact.valid,
                    causal=True,
                )
            ]
            self.calls += 1
            share = 0.0
            if self.stored:
                stored, share = self.selector.attend(self.store, rows, scale)
                parts += stored
            self.read += (share * self.stored + length - self.stored) / length
            out = merged(parts)
        self.length = length
        self._move(rows if past == 0 else None, scale)
        return out

    @staticmethod
    def _positions(mask: Tensor | None, past: int, k: Tensor) -> Int[Tensor, "b 1 l_q"]:
        """Return the positions of new tokens as models count them: padding has none."""
        rows, length = k.shape[0], past + k.shape[2]
        if mask is None:
            found = torch.arange(past, length, device=k.device).expand(rows, -1)
        else:
            found = (mask[:, :length].cumsum(1) - 1).clamp(min=0)[:, past:]
        return found[:, None].to(torch.int32)

    def _sinks_first(self, new: Part) -> Part:
        """Return the tokens of a prompt with the first real ones of each row at the front."""
        assert new.valid is not None
        real = new.valid[:, 0]
        at = torch.arange(new.slots, device=real.device)
        first = torch.where(real, at, new.slots).amin(1, keepdim=True)
        inside = (at >= first) & (at < first + self.sink)
        order = (~inside).long().argsort(dim=1, stable=True)
        self.positions = order[:, : self.sink]
        return new.take(order[:, None])

    def _move(self, q: Tensor | None, scale: float) -> None:
        """Hand tokens that are neither first nor last to the store."""
        exact = self.exact
        assert exact is not None
        if self.positions is not None:
            self.sinks = self.positions.shape[1]
        elif not self.stored:
            self.sinks = min(self.sink, exact.slots)
        spare = exact.slots - self.sinks - self.recent
        if spare < (self.flush if q is None else 1):
            return
        spare = spare // self.store.granule * self.store.granule
        if spare == 0:
            return
        end = self.sinks + spare
        first, part, last = exact.cut(0, self.sinks), exact.cut(self.sinks, end), exact.cut(end)
        prompt = None if q is None else Prompt(q, first, last)
        part = part.own()
        if prompt is None:
            with self.beside.work(part):
                self.selector.append(self.store, part, None, scale)
        else:
            self.selector.append(self.store, part, prompt, scale)
        self.stored += spare
        self.exact = joined(first, last).own()

    def crop(self, tokens_to_remove: int | Int[Tensor, ""]) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: their number, as a negative int; transformers 5.17 gives a tensor.

        Raises:
            ValueError: the number is positive.
        """
        self.beside.wait()
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: accepted is an int <= 0, such as -5 for the last five"
            )
        count = min(-tokens_to_remove, self.length)
        if count == 0 or self.exact is None:
            return
        if count == self.length:
            self.reset()
            return
        exact = self.exact
        self.length -= count
        last = min(count, exact.slots - self.sinks)
        exact, count = exact.cut(0, exact.slots - last), count - last
        if count and self.stored:
            gone = min(count, self.stored)
            rest = self.selector.crop(self.store, gone)
            self.stored, count = self.stored - gone, count - gone
            if rest is not None:
                self.stored -= rest.slots
                exact = joined(exact.cut(0, self.sinks), joined(rest, exact.cut(self.sinks)))
        if count and self.positions is None:
            exact, self.sinks = exact.cut(0, self.sinks - count), self.sinks - count
        self.exact = self._without_later(exact)

    def _without_later(self, exact: Part) -> Part:
        """Empty the first slots that hold tokens after the last one that is left."""
        if self.positions is None:
            return exact
        gone = self.positions >= self.length
        first = exact.cut(0, self.sinks)
        assert first.valid is not None
        first = Part(first.tensors, first.slots, first.valid & ~gone[:, None])
        return joined(first, exact.cut(self.sinks))

    def fork(self) -> "ZoneLayer":
        """Return a layer with the same tokens, which both share until they change."""
        self.beside.wait()
        layer = copy(self)
        layer.beside = Beside(self.beside.on)
        layer.store, layer.selector = self.store.fork(), self.selector.fork()
        return layer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.beside.wait()
        if self.exact is None:
            return
        self.exact = self.exact.rows(beam_idx)
        if self.positions is not None:
            self.positions = self.positions[beam_idx.to(self.positions.device)]
        self.store.rows(beam_idx)
        self.selector.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.exact is not None:
            rows = self.exact.k.shape[0]
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens with the new ones, and 0: masks tell of all tokens, stored ones too."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values and of what tells them apart."""
        found = 0 if self.exact is None else self.exact.nbytes
        if self.positions is not None:
            found += self.positions.nbytes
        return found + self.store.nbytes + self.selector.nbytes
