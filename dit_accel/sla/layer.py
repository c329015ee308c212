"""`LayerAttention`: sparse or dense attention in one layer of a transformer, and its counts."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.sla.attention import SparseLinearAttention
from dit_accel.sla.text import Text, padding_to_end, padding_to_text

LAYER, STEP, MASK, SHORT, CROSSOVER, PAUSED = range(6)
"""Why a call runs dense."""


CALL_STATE = (
    "observer", "dense", "image", "blocks", "shortest", "counts", "tally", "dense_count",
)  # fmt: skip
Observer = Callable[..., None]


class LayerCounts:
    """Counts of one attention layer in one run, kept as tensors so that counting needs no device sync."""

    def __init__(self, device: torch.device) -> None:
        self.dense = torch.zeros(PAUSED + 1, dtype=torch.int64, device=device)
        """Dense calls by reason."""
        self.tally = torch.zeros(3, dtype=torch.int64, device=device)
        """Sparse calls, pairs of queries and keys that they attended to, and all pairs. The operator that
        selects blocks adds to it, so that counting needs no launch."""


class LayerAttention:
    """The seam `attend` of one attention processor.

    All that changes between calls is set before the transformer runs, and counts are tensors: a compiled
    block serves every layer, step and image size.
    """

    def __init__(self, module: SparseLinearAttention, scheduled: bool) -> None:
        self.module = module
        self.scheduled = scheduled
        """Whether the schedule lets this layer run sparse on some step."""
        self.observer: Observer | None = None
        """Called with the inputs of each call that would run sparse and is paused."""
        self.dense = True
        self.image = torch.empty(0, 0, dtype=torch.float32)
        """`[N, 0]`: image tokens among the keys. A shape, which compiled blocks take as it comes: the numbers
        that they find in an object are theirs for good."""
        self.blocks: Tensor | None = None
        """`[n + 1, 0]`: each row reads its n best key blocks exactly. A shape, for the same reason; one more, because
        a size of 1 would be a constant of a compiled block. None: `top_p` alone decides."""
        self.shortest = 0
        """Keys from which sparse attention pays."""
        self.store: Any = None
        """Whose `totals` are sums over image keys, kept up to date; None: nobody keeps them."""
        self.count_into(LayerCounts(torch.device("cpu")))

    def count_into(self, counts: LayerCounts, *, paused: bool = False) -> None:
        """Count the next calls there."""
        self.counts, self.tally = counts.dense, counts.tally
        reason = STEP if self.scheduled else LAYER
        self.dense_count = self.counts[PAUSED if paused else reason]

    def call_state(self) -> dict[str, Any]:
        """Return what `begin_call` sets, to put it back with `vars(layer).update`."""
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
        """Return the output of sparse attention, or None where this call has to run dense; count it either way.

        Arguments are those of `SparseProcessor.run`.
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
            # Images begin at different places of their rows: for the kernels they all come first.
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
        """Return why a call of a scheduled layer runs dense; 0: it does not."""
        tokens = self.image.shape[0]
        if masked:
            return MASK
        if tokens <= self.module.config.block_k:
            return SHORT
        return CROSSOVER if tokens < self.shortest else 0
