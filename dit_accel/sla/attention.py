"""`SparseAttention`: decides per call whether attention runs sparse, runs it, and counts."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from dit_accel.config import SLAConfig
from dit_accel.kernels import SparsePlan, block_scores, sparse_linear_attention
from dit_accel.sla.crossover import min_sparse_length
from dit_accel.sla.order import tile_order


@dataclass
class LayerStats:
    """What one attention layer did during one run."""

    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    """Calls that ran dense, by reason."""
    density_sum: float | Tensor = 0.0
    """Sum of the densities of the sparse calls; a tensor, so that no call waits for the device."""

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls; None without one."""
        return float(self.density_sum) / self.sparse_calls if self.sparse_calls else None

    @property
    def calls(self) -> int:
        return self.sparse_calls + self.dense_calls.total()


class SparseAttention:
    """The `attend` seam of the attention processors: one object for all layers of a transformer.

    Args:
        config: what to do; layer indices are checked against `num_layers`.
        num_layers: self-attention layers of the transformer.
    """

    def __init__(self, config: SLAConfig, num_layers: int) -> None:
        config.check_layers(num_layers)
        self.config = config
        self.num_layers = num_layers
        self.router: Callable[..., Tensor] = block_scores
        """Ranks key blocks; takes the arguments of `block_scores`."""
        self.grid: tuple[int, int, int] | None = None
        """Latent tokens (t, h, w) of the current call."""
        self.reset()

    def reset(self) -> None:
        """Start counting anew (a new run begins)."""
        self.layers = [LayerStats() for _ in range(self.num_layers)]
        self.step = 0
        self.num_dense_steps = 0

    def begin_step(self, step: int, num_steps: int, grid: tuple[int, int, int]) -> None:
        """What the next transformer call is: step `step` of `num_steps`, over `grid` tokens."""
        dense = self.config.dense_steps
        self.num_dense_steps = (
            dense if isinstance(dense, int) else math.ceil(dense * num_steps - 1e-9)
        )
        self.step, self.grid = step, grid

    def is_scheduled(self, layer: int) -> bool:
        """Whether this layer is meant to run sparse on some step."""
        return not self.config.is_dense_layer(layer, self.num_layers)

    def __call__(
        self,
        layer: int,
        q: Float[Tensor, "b h l_q d"],
        k: Float[Tensor, "b h_kv l_k d"],
        v: Float[Tensor, "b h_kv l_k d_v"],
        *,
        masked: bool = False,
    ) -> Float[Tensor, "b h l_q d_v"] | None:
        """Sparse attention of one layer, or None when this call has to run dense (it is counted)."""
        stats = self.layers[layer]
        reason = self._dense_reason(layer, q, k, masked)
        if reason is not None:
            stats.dense_calls[reason] += 1
            return None
        topk = self.config.layer_topk(layer, self.num_layers)
        o, plan = self._attend(q, k, v, topk)
        stats.sparse_calls += 1
        stats.density_sum = stats.density_sum + plan.density_tensor()
        return o

    def _dense_reason(self, layer: int, q: Tensor, k: Tensor, masked: bool) -> str | None:
        config = self.config
        if not self.is_scheduled(layer):
            return "dense layer"
        if self.step < self.num_dense_steps:
            return "dense step"
        if masked:
            return "attention mask"
        if config.order != "raster" and q.shape[2] != k.shape[2]:
            return "active tokens of region-adaptive sampling in a tile order"
        if k.shape[2] <= config.block_k:
            return f"one block: {k.shape[2]} keys, block_k={config.block_k}"
        if config.crossover == "auto":
            topk = config.layer_topk(layer, self.num_layers)
            shortest = min_sparse_length(q.device.type, topk=topk, block=config.block_k)
            if shortest is None:
                return f"crossover='auto': not measured on {q.device.type}"
            if k.shape[2] < shortest:
                return f"crossover='auto': {k.shape[2]} tokens, sparse wins from {shortest}"
        return None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, topk: float) -> tuple[Tensor, SparsePlan]:
        config = self.config
        order = None
        if config.order != "raster":
            if self.grid is None or math.prod(self.grid) != q.shape[2]:
                raise RuntimeError(
                    f"order={config.order}: the grid {self.grid} does not hold {q.shape[2]} tokens"
                )
            order = tile_order(self.grid, config.order, q.device)  # type: ignore[arg-type]
            q, k, v = order.apply(q), order.apply(k), order.apply(v)
        sizes = None if order is None else order.sizes
        pool_sizes = None if sizes is None else sizes[None]
        scores = self.router(
            q,
            k,
            block_q=config.block_q,
            block_k=config.block_k,
            q_sizes=pool_sizes,
            k_sizes=pool_sizes,
        )
        plan = SparsePlan.from_scores(
            scores,
            topk=topk,
            block_q=config.block_q,
            block_k=config.block_k,
            q_len=q.shape[2],
            kv_len=k.shape[2],
            q_block_sizes=sizes,
            k_block_sizes=sizes,
        )
        o = sparse_linear_attention(q, k, v, plan, combine=config.combine)
        return (o if order is None else order.undo(o)), plan
