"""`SparseAttention`: which layers run sparse in which steps, and what they really did."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.config import SLAConfig, num_steps_of
from dit_accel.models import AttentionLayer, TokenOrder
from dit_accel.sla.attention import SparseLinearAttention, Text
from dit_accel.sla.crossover import NEVER, min_sparse_length
from dit_accel.sla.order import tile_order

LAYER, STEP, MASK, SHORT, CROSSOVER = range(5)
"""Why a call runs dense; the next place counts the sparse calls."""
SPARSE = 5


@dataclass(frozen=True)
class LayerStats:
    """What one attention layer did during one run."""

    sparse_calls: int
    dense_calls: dict[str, int]
    """Calls that ran dense, by reason."""
    density: float | None
    """Mean over the sparse calls; None without one."""


class LayerAttention:
    """The seam `attend` of one attention processor.

    All that changes between calls is set before the transformer runs, and counts are tensors: a compiled
    block serves every layer, step and image size.
    """

    def __init__(self, module: SparseLinearAttention, scheduled: bool) -> None:
        self.module = module
        self.scheduled = scheduled
        """Whether the schedule lets this layer run sparse on some step."""
        self.dense = True
        self.image = torch.empty(0, 0)
        """`[N, 0]`: image tokens among the keys. A shape, which compiled blocks take as it comes: the numbers
        that they find in an object are theirs for good."""
        self.shortest = 0
        """Keys from which sparse attention pays."""
        self.store: Any = None
        """Whose `totals` are sums over image keys, kept up to date; None: nobody keeps them."""
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Count anew."""
        self.counts = torch.zeros(SPARSE + 1, dtype=torch.int64, device=device)
        self.density_sum = torch.zeros((), device=device)
        self.dense_count = self.counts[LAYER]

    def __call__(
        self,
        q: Float[Tensor, "b h l_q d"],
        k: Float[Tensor, "b h_kv l_k d"],
        v: Float[Tensor, "b h_kv l_k d_v"],
        *,
        text: Text = "none",
        masked: bool = False,
        scale: float | None = None,
    ) -> Float[Tensor, "b h l_q d_v"] | None:
        """Sparse attention, or None where this call has to run dense; either way it is counted."""
        tokens = self.image.shape[0]
        if self.dense:
            self.dense_count.add_(1)
        elif masked:
            self.counts[MASK].add_(1)
        elif tokens <= self.module.config.block_k:
            self.counts[SHORT].add_(1)
        elif tokens < self.shortest:
            self.counts[CROSSOVER].add_(1)
        else:
            o, density = self.module(
                q,
                k,
                v,
                text=text,
                text_tokens=k.shape[2] - tokens,
                scale=scale,
                state=None if self.store is None else self.store.totals,
            )
            self.counts[SPARSE].add_(1)
            self.density_sum.add_(density)
            return o
        return None


class SparseAttention:
    """Sparse attention of a whole transformer.

    Args:
        config: what to do; layer indices are checked against `layers`.
        layers: the transformer's self-attention layers.
    """

    def __init__(self, config: SLAConfig, layers: Mapping[str, AttentionLayer]) -> None:
        count = len(layers)
        config.check_layers(count)
        self.config = config
        self._attention = {name: layer.module for name, layer in layers.items()}
        self.layers: dict[str, LayerAttention] = {}
        for i, (name, layer) in enumerate(layers.items()):
            module = SparseLinearAttention(
                config, layer.module.heads, layer.head_dim, topk=config.layer_topk(i, count)
            )
            if isinstance(weight := getattr(layer.module.to_q, "weight", None), Tensor):
                module.to(weight.device if weight.device.type != "meta" else "cpu")
            self.layers[name] = LayerAttention(module, not config.is_dense_layer(i, count))
        self._tokens = 0
        self._begun = False

    @property
    def modules(self) -> dict[str, SparseLinearAttention]:
        """By the name of the attention layer."""
        return {name: layer.module for name, layer in self.layers.items()}

    def set_router(self, router: Callable[..., Tensor]) -> None:
        """Rank key blocks otherwise; it takes the arguments of `block_scores`."""
        for layer in self.layers.values():
            layer.module.router = router

    def attach(self) -> None:
        """Weights become part of the transformer, as the submodule `sla` of each attention layer."""
        if self.config.has_weights:
            for name, module in self._attention.items():
                module.add_module("sla", self.layers[name].module)

    def detach(self) -> None:
        """Undo `attach`."""
        for name, module in self._attention.items():
            if module._modules.get("sla") is self.layers[name].module:
                del module.sla

    def reset(self) -> None:
        """Count anew: a run begins."""
        self._begun = False

    @torch.inference_mode(False)  # counts go on in calls with gradients
    def begin_step(
        self, step: int, num_steps: int, grid: tuple[int, int, int], device: torch.device
    ) -> None:
        """What the next transformer call is: step `step` of `num_steps`, over `grid` image tokens."""
        if not self._begun:
            self._begun = True
            for layer in self.layers.values():
                layer.reset(device)
                layer.shortest = self._shortest(layer, device)
        dense_step = step < num_steps_of(self.config.dense_steps, num_steps)
        self._tokens = math.prod(grid)
        image = torch.empty(self._tokens, 0, device=device)
        for layer in self.layers.values():
            layer.image = image
            layer.dense = dense_step or not layer.scheduled
            layer.dense_count = layer.counts[STEP if layer.scheduled else LAYER]

    def end_step(self) -> None:
        """The transformer call is over."""
        for layer in self.layers.values():
            layer.module.keep_measured()

    def order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        """The order that the tokens of this grid run in; None: raster, as where no layer runs sparse."""
        tile = self.config.tile_of(grid)
        return tile_order(grid, tile, device) if tile and self._pays(grid, device) else None

    def tile(self, grid: tuple[int, int, int], device: torch.device) -> int | None:
        """Tokens of this grid that are best selected together: query blocks, if any layer runs sparse."""
        return self.config.block_q if self._pays(grid, device) else None

    def _pays(self, grid: tuple[int, int, int], device: torch.device) -> bool:
        tokens = math.prod(grid)
        return tokens > self.config.block_k and any(
            layer.scheduled and self._shortest(layer, device) <= tokens
            for layer in self.layers.values()
        )

    def _shortest(self, layer: LayerAttention, device: torch.device) -> int:
        config = self.config
        if config.crossover == "never":
            return 0
        topk = layer.module.topk
        assert topk is not None  # `top_p` goes with "never"
        return min_sparse_length(device.type, topk=topk, block=config.block_k)

    def stats(self) -> dict[str, LayerStats]:
        """What each layer did in the last run. Waits for the device."""
        return {name: self._stats(layer) for name, layer in self.layers.items()}

    def _stats(self, layer: LayerAttention) -> LayerStats:
        counts = layer.counts.tolist()
        reasons = {
            LAYER: "dense layer",
            STEP: "dense step",
            MASK: "attention mask",
            SHORT: f"one block: {self._tokens} tokens, block_k={self.config.block_k}",
            CROSSOVER: f"crossover='auto': {self._tokens} tokens, sparse {_from(layer.shortest)}",
        }
        sparse = counts[SPARSE]
        return LayerStats(
            sparse_calls=sparse,
            dense_calls={text: counts[i] for i, text in reasons.items() if counts[i]},
            density=float(layer.density_sum) / sparse if sparse else None,
        )


def _from(shortest: int) -> str:
    return "was not measured to win" if shortest == NEVER else f"from {shortest} on"
