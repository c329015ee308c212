"""`ZoneLayer`: cache layer that keeps the first and the last tokens exact and the tokens between them in a store."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dit_accel.llm.kvcache.part import Part, joined
from dit_accel.llm.kvcache.partial import attention_part, grouped, merged
from dit_accel.llm.kvcache.selector import PromptQueries, Selector
from dit_accel.llm.kvcache.side_stream import SideStream
from dit_accel.llm.kvcache.store import Store

TAG = "_dit_accel_layer"
"""Name of the attribute of new keys through which the attention function finds the cache layer."""
NOT_READ = (
    "past_key_values: the attention function of the model does not read a KVCache; call "
    "dit_accel.llm.enable(model, kv=...) first"
)


def check_cached(
    mask: Tensor | None, *, causal: bool, softcap: float | None, dropout: float
) -> None:
    """Check that a `ZoneLayer` supports the arguments of an attention call.

    Raises:
        ValueError: an argument is not supported.
    """
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask: has shape {tuple(mask.shape)}; must be a padding mask [B, L] with kv="
        )
    for name, wrong in (
        ("is_causal=False", not causal),
        ("softcap", softcap),
        ("dropout", dropout),
    ):
        if wrong:
            raise ValueError(f"{name}: not supported with kv=")


class ZoneLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    The first `sink` tokens and the last tokens of each batch row stay exact, because attention to them is strong and
    errors there cost most. The tokens between them go through a selector into a store. Attention over the zones is merged
    by log-sum-exp, and is exact if the store is exact and the selector reads all tokens.

    Args:
        store: store of the tokens between the exact ones.
        selector: selector that chooses the stored tokens to read.
        sink: number of first tokens of each row that stay exact, not counting padding on the left.
        recent: smallest number of last tokens that stay exact.
        flush: number of tokens that move to the store at a time.
        overlap: on a GPU, store tokens after the prompt on a second stream while the next layers run.
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
        self.side_stream = SideStream(overlap)
        self.is_croppable = not selector.forgets
        self.reset()

    def reset(self) -> None:
        """Remove all tokens."""
        self.exact: Part | None = None
        """Exact tokens: the first tokens, followed by the last tokens."""
        self.length = 0
        self.sinks = 0
        """Number of slots at the front of `exact` that hold the first tokens."""
        self.positions: Int[Tensor, "b sinks"] | None = None
        """Positions of these first tokens, if rows have padding on the left; else None."""
        self.stored = 0
        """Number of tokens that were passed to the selector."""
        self.calls = 0
        """Number of calls that found tokens in the cache."""
        self.read = 0.0
        """Sum of the shares of the tokens that these calls read."""
        self.pending = False
        """True between `update` and `attend`."""
        self.store.clear()
        self.selector.clear()
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values, tagged with this layer. `attend` then adds them to the cache.

        Raises:
            ValueError: the keys of the previous call never reached `attend`.
        """
        if self.pending:
            self.pending = False  # drop only the tokens that did not reach `attend`
            raise ValueError(NOT_READ)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = True
        # A view, so that the model's own tensor is not tagged.
        key_states = key_states.view_as(key_states)
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
        """Return the attention output of new tokens, and add them to the cache.

        Args:
            q, k, v: queries, keys and values of the new tokens.
            mask: real tokens of the cache and the call, `[B, L]`; None if there is no padding.
            scale: factor of the dot products.
            prompt: function that computes the attention output if the cache is empty.
        """
        self.side_stream.wait()
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
        """Return the position ids of new tokens. Padding does not count."""
        rows, length = k.shape[0], past + k.shape[2]
        if mask is None:
            found = torch.arange(past, length, device=k.device).expand(rows, -1)
        else:
            found = (mask[:, :length].cumsum(1) - 1).clamp(min=0)[:, past:]
        return found[:, None].to(torch.int32)

    def _sinks_first(self, new: Part) -> Part:
        """Return the tokens of a padded prompt with the first real tokens of each row moved to the front."""
        assert new.valid is not None
        real = new.valid[:, 0]
        at = torch.arange(new.slots, device=real.device)
        first = torch.where(real, at, new.slots).amin(1, keepdim=True)
        inside = (at >= first) & (at < first + self.sink)
        order = (~inside).long().argsort(dim=1, stable=True)
        self.positions = order[:, : self.sink]
        return new.take(order[:, None])

    def _move(self, q: Tensor | None, scale: float) -> None:
        """Move tokens that are neither first nor last tokens from `exact` to the store, if there are enough."""
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
        prompt = None if q is None else PromptQueries(q, first, last)
        part = part.own()
        if prompt is None:
            with self.side_stream.work(part):
                self.selector.append(self.store, part, None, scale)
        else:
            self.selector.append(self.store, part, prompt, scale)
        self.stored += spare
        self.exact = joined(first, last).own()

    def crop(self, tokens_to_remove: int | Int[Tensor, ""]) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: negative number of tokens; transformers 5.17 passes a tensor.

        Raises:
            ValueError: the number is positive.
        """
        self.side_stream.wait()
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: must be an int <= 0, such as -5 for the last five tokens"
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
        """Mask first slots whose tokens were cropped. With padding, rows may have fewer first tokens than others."""
        if self.positions is None:
            return exact
        gone = self.positions >= self.length
        first = exact.cut(0, self.sinks)
        assert first.valid is not None
        first = Part(first.tensors, first.slots, first.valid & ~gone[:, None])
        return joined(first, exact.cut(self.sinks))

    def fork(self) -> "ZoneLayer":
        """Return a copy that shares memory until one of the two changes."""
        self.side_stream.wait()
        layer = copy(self)
        layer.side_stream = SideStream(self.side_stream.on)
        layer.store, layer.selector = self.store.fork(), self.selector.fork()
        return layer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the batch rows `beam_idx`, in this order."""
        self.side_stream.wait()
        if self.exact is None:
            return
        self.exact = self.exact.rows(beam_idx)
        if self.positions is not None:
            self.positions = self.positions[beam_idx.to(self.positions.device)]
        self.store.rows(beam_idx)
        self.selector.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        if self.exact is not None:
            rows = self.exact.k.shape[0]
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select the batch rows `indices` (indices or a bool mask)."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the mask: it covers all tokens, including stored ones."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and the data of the selector."""
        found = 0 if self.exact is None else self.exact.nbytes
        if self.positions is not None:
            found += self.positions.nbytes
        return found + self.store.nbytes + self.selector.nbytes
