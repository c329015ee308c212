"""`Policy`: sparse prefill settings and call counts of one model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.config import KVConfig, PrefillConfig
from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.llm.dense import dense_attention
from dit_accel.llm.head_counts import HeadCounts
from dit_accel.llm.padding import broadcast_mask, real_spans
from dit_accel.llm.prefill import Pattern, Prompt, Spans, pattern_of
from dit_accel.llm.spans import SpanTracker, cut
from dit_accel.llm.window import window_attention, window_density

CROSSOVER = 4096
"""Prompt length from which sparse attention is faster on a CPU, measured in fp32 and bf16 (docs/prefill.md)."""
CROSSOVER_GPU = 8192
"""Prompt length from which sparse attention is used on a GPU (placeholder, not benchmarked)."""
KEPT_PLANS = 8
"""Number of plans that a layer stores before it computes their densities."""


@dataclass
class LayerCounts:
    """Attention calls of one layer since `enable`."""

    sparse: int = 0
    """Number of sparse calls."""
    dense: Counter[str] = field(default_factory=Counter)
    """Number of dense calls by reason."""
    cached: int = 0
    """Number of calls that read tokens from a `KVCache`."""
    without_spans: int = 0
    """Sparse calls of a multimodal model whose pattern needs image and video spans, but the spans were not known."""
    plans: list[tuple[SparsePlan, float]] = field(default_factory=list)
    """Plans whose density is not computed yet, each with its share of the batch rows of the call."""
    read: float = 0.0
    """Sum of the densities computed so far."""

    def note(self, plan: SparsePlan, share: float = 1.0) -> None:
        """Store a plan to compute its density later, because counting pairs during the call would slow it down."""
        self.plans.append((plan, share))
        if len(self.plans) > KEPT_PLANS:
            self._count()

    def note_density(self, density: float, share: float = 1.0) -> None:
        """Add a call whose density is known."""
        self.read += density * share

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls; None if there was no sparse call."""
        self._count()
        return self.read / self.sparse if self.sparse else None

    def _count(self) -> None:
        self.read += sum(plan.density() * share for plan, share in self.plans)
        self.plans.clear()


class Policy:
    """Sparse prefill settings and call counts, shared by the attention layers of one model.

    Args:
        config: settings of sparse prefill.
        layers: number of attention layers.
        heads: head counts of each layer. Default: not known, and not checked.

    Raises:
        ValueError: a pattern or layer does not exist, or the settings are for a different number of heads.
    """

    def __init__(self, config: PrefillConfig, layers: int, heads: HeadCounts | None = None) -> None:
        self.config = config
        self.patterns: list[Pattern | None] = []
        """Pattern of each layer; None for a dense layer."""
        for layer in range(layers):
            chosen = config.of_layer(layer, layers)
            pattern = None if chosen is None else pattern_of(*chosen)
            if pattern is not None and heads is not None:
                pattern.check_heads(*heads)
            self.patterns.append(pattern)
        self.counts = {layer: LayerCounts() for layer in range(layers)}
        self.before: list[tuple[Any, Any]] = []
        """Configs of the model with the attention implementation that each had before `enable`."""
        self.tracker: SpanTracker | None = None
        """Tracker of image and video spans; None if no pattern needs them."""
        self.kv: KVConfig | None = None
        """Settings of the KV cache; None for transformers' own cache."""
        self.cache_hook: Any = None
        """Handle of the hook that passes a `KVCache` to calls."""
        self._spans: tuple[Tensor, Any] | None = None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """Return the attention output `[B, Hq, Lq, D]` of a call, sparse if possible.

        Args:
            layer: index of the layer.
            q, k, v: queries, keys and values `[B, H, L, D]`, without unwritten keys of static caches.
            mask: real tokens `[B, Lk]`, with a window `[B, Lk, window]`, or visible pairs `[B, 1, Lq, Lk]`; None: all.
            scale: factor of the dot products.
            causal: whether the layer is causal.
            window: number of keys that each query sees; None: all keys up to its own position.
            softcap, dropout: see `dense_attention`.
        """
        counts = self.counts[layer]
        reason = self._why_dense(layer, q, k, mask, causal, window, softcap, dropout)
        spans = None
        if reason is None and mask is not None:
            spans = self._spans_of(mask)
            reason = "padding in the middle of a row" if spans is None else None
            if spans is not None and list(spans) == [(0, k.shape[2])]:
                spans = None  # no padding
        if reason is not None:
            counts.dense[reason] += 1
            return dense_attention(
                q,
                k,
                v,
                scale=scale,
                causal=causal,
                mask=broadcast_mask(mask),
                window=None if mask is not None and mask.ndim == 4 else window,
                softcap=softcap,
                dropout=dropout,
            )
        counts.sparse += 1
        modal = self._modal_spans(layer)
        if spans is None:
            return self._sparse(layer, q, k, v, scale, window, modal)
        return self._padded(layer, q, k, v, scale, window, spans, modal)

    def _why_dense(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        causal: bool,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> str | None:
        """Return the reason why a call must be dense; None if it can be sparse."""
        if q.shape[2] == 1:
            return "decode"
        if mask is not None and mask.ndim == 4:
            return "a mask of pairs" if window is None else "sliding window"
        if not causal:
            return "not causal"
        if softcap is not None:
            return "soft cap"
        if dropout:
            return "dropout"
        # Window attention skips only hidden keys, so it is exact and also allowed in layers that must stay dense.
        if self.patterns[layer] is None and not _slides(k, window):
            return "dense layer"
        if k.shape[2] < self._crossover(q):
            return "short prompt"
        return None

    def _crossover(self, q: Tensor) -> int:
        length = self.config.crossover
        if length != "auto":
            return length
        return CROSSOVER_GPU if q.is_cuda else CROSSOVER

    def _spans_of(self, mask: Tensor) -> Any:
        """Return `real_spans(mask)`, cached so that the layers of a forward pass synchronize with the device once."""
        if self._spans is None or self._spans[0] is not mask:
            self._spans = mask, real_spans(mask)
        return self._spans[1]

    def _modal_spans(self, layer: int) -> Sequence[Spans] | None:
        """Return the image and video spans of a call; None if the pattern does not need them or they are not known."""
        pattern, tracker = self.patterns[layer], self.tracker
        if tracker is None or pattern is None or not pattern.reads_spans:
            return None
        self.counts[layer].without_spans += tracker.multimodal and tracker.rows is None
        return tracker.rows

    def _sparse(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        modal: Sequence[Spans] | None,
        share: float = 1.0,
    ) -> Tensor:
        """Run and count a sparse call on all batch rows, or on a subset whose share of the rows is `share`."""
        counts, pattern = self.counts[layer], self.patterns[layer]
        if pattern is None or _slides(k, window):
            assert window is not None  # dense layers without a window do not come here
            counts.note_density(window_density(q.shape[2], k.shape[2], window), share)
            return window_attention(q, k, v, scale=scale, window=window, block=self.config.block)
        prompt = Prompt(
            q,
            k,
            scale=scale,
            block=self.config.block,
            tail=self.config.tail,
            layer=layer,
            spans=modal,
        )
        plan = pattern.plan(prompt)
        out = block_sparse_attention(q, k, v, plan, scale=scale)
        assert isinstance(out, Tensor)
        counts.note(plan, share)
        return out

    def _padded(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        spans: dict[tuple[int, int], list[int]],
        modal: Sequence[Spans] | None,
    ) -> Tensor:
        """Run rows with the same padding together after cutting the padding off, so that it does not change results."""
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        shift = k.shape[2] - q.shape[2]
        for (start, stop), rows in spans.items():
            first, last = max(0, start - shift), max(0, stop - shift)
            if first >= last:
                continue
            out[rows, :, first:last] = self._sparse(
                layer,
                q[rows, :, first:last],
                k[rows, :, start:stop],
                v[rows, :, start:stop],
                scale,
                window,
                modal and [cut(modal[row], start, stop) for row in rows],
                len(rows) / len(q),
            )
        return out


def _slides(k: Tensor, window: int | None) -> bool:
    """Return whether a window hides some of these keys."""
    return window is not None and window < k.shape[2]
