"""`LayerAttention`: sparse or dense attention in one layer of a transformer, and its counts."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.sla.attention import SparseLinearAttention
from dit_accel.sla.text import Text, padding_to_end, padding_to_text

LAYER, STEP, MASK, SHORT, CROSSOVER, PAUSED = range(6)
"""Reasons why a call runs dense, as indices of `LayerCounts.dense`."""


CALL_STATE = (
    "observer", "dense", "image", "blocks", "shortest", "counts", "tally", "dense_count",
)  # fmt: skip
Observer = Callable[..., None]


class LayerCounts:
    """Counts of one attention layer in one run. They are tensors, so that counting needs no device sync."""

    def __init__(self, device: torch.device) -> None:
        self.dense = torch.zeros(PAUSED + 1, dtype=torch.int64, device=device)
        """Number of dense calls by reason."""
        self.tally = torch.zeros(3, dtype=torch.int64, device=device)
        """Number of sparse calls, of their attended (query, key) pairs, and of all pairs. The operator that selects blocks
        adds to it, so that counting needs no launch of its own."""


class LayerAttention:
    """Implementation of the seam `attend` for one attention processor.

    All values that change between calls are set before the transformer runs, and counts are tensors. A compiled block
    therefore serves every layer, step and image size.
    """

    def __init__(self, module: SparseLinearAttention, scheduled: bool) -> None:
        self.module = module
        self.scheduled = scheduled
        """True if the schedule lets this layer run sparse in some step."""
        self.observer: Observer | None = None
        """Function that is called with the inputs of each paused call that would have run sparse."""
        self.dense = True
        self.image = torch.empty(0, 0, dtype=torch.float32)
        """Tensor `[N, 0]`; N is the number of image keys. Stored as a tensor shape, because torch.compile specialises on
        Python ints."""
        self.blocks: Tensor | None = None
        """Tensor `[n + 1, 0]`; n is the number of key blocks that each row reads exactly. A tensor shape for the same reason,
        plus one, because torch.compile specialises on sizes of 1. None: `top_p` alone decides."""
        self.shortest = 0
        """Number of keys from which sparse attention is faster."""
        self.store: Any = None
        """Store whose `totals` are sums over image keys; None if no store keeps them."""
        self.count_into(LayerCounts(torch.device("cpu")))

    def count_into(self, counts: LayerCounts, *, paused: bool = False) -> None:
        """Set the counts of the next calls."""
        self.counts, self.tally = counts.dense, counts.tally
        reason = STEP if self.scheduled else LAYER
        self.dense_count = self.counts[PAUSED if paused else reason]

    def call_state(self) -> dict[str, Any]:
        """Return the attributes that `begin_call` sets, to restore them with `vars(layer).update`."""
        return {name: getattr(self, name) for name in CALL_STATE}

    def __call__(
        self,
        q: Float[Tensor, "b h l_q d"],
        k: Float[Tensor, "b h_kv l_k d"],
        v: Float[Tensor, "b h_kv l_k d_v"],
        *,
        text: Text = "none",
        masked: bool = False,
        text_lengths: Int[Tensor, " b"] | None = None,
        padding: Int[Tensor, " b"] | None = None,
        scale: float | None = None,
    ) -> Float[Tensor, "b h l_q d_v"] | None:
        """Return the output of sparse attention, or None if this call has to run dense. The call is counted.

        Arguments are as in `SparseProcessor.run`.
        """
        reason = self._reason(masked)
        if self.dense:
            self.dense_count.add_(1)
        elif reason:
            self.counts[reason].add_(1)
        if reason or (self.dense and (self.observer is None or not self.scheduled)):
            return None
        text_tokens = k.shape[2] - self.image.shape[0]
        if padding is not None:
            # Images begin at different positions in their rows. The kernels need them at the beginning.
            text, text_lengths = "last", text_tokens - padding
            q, k, v = (padding_to_text(x, text_tokens, text_lengths) for x in (q, k, v))
        options: dict[str, Any] = {"text": text, "text_tokens": text_tokens, "scale": scale}
        if text_lengths is not None:
            options["text_lengths"] = text_lengths
        if self.dense:
            assert self.observer is not None
            self.observer(q, k, v, **options)
            return None
        o = self.module(
            q,
            k,
            v,
            **options,
            topk_blocks=None if self.blocks is None else self.blocks.shape[0] - 1,
            state=None if self.store is None else self.store.totals,
            tally=self.tally,
        )
        if padding is None:
            return o
        assert text_lengths is not None
        return padding_to_end(o, text_tokens, text_lengths)

    def _reason(self, masked: bool) -> int:
        """Return why a call of a scheduled layer runs dense; 0 if it runs sparse."""
        tokens = self.image.shape[0]
        if masked:
            return MASK
        if tokens <= self.module.config.block_k:
            return SHORT
        return CROSSOVER if tokens < self.shortest else 0
