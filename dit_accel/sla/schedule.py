"""`SparseAttention`: the sparse attention method, its schedule of layers and steps, and its counts."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_accel.config import SLAConfig, num_steps_of
from dit_accel.models import AttentionLayer, Call, TokenOrder
from dit_accel.runtime.method import Host, Method
from dit_accel.runtime.run import Run
from dit_accel.sla.attention import SparseLinearAttention, Text
from dit_accel.sla.crossover import NEVER, min_sparse_length
from dit_accel.sla.geometry import query_block
from dit_accel.sla.order import Reordered, tile_order
from dit_accel.sla.summary import AttentionSummary, LayerSummary

LAYER, STEP, MASK, SHORT, CROSSOVER, PAUSED = range(6)
"""Why a call runs dense."""


class LayerCounts:
    """Counts of one attention layer in one run, kept as tensors so that counting needs no device sync."""

    def __init__(self, device: torch.device) -> None:
        self.dense = torch.zeros(PAUSED + 1, dtype=torch.int64, device=device)
        """Dense calls by reason."""
        self.tally = torch.zeros(3, dtype=torch.int64, device=device)
        """Sparse calls, pairs of queries and keys that they attended to, and all pairs. The operator that
        selects blocks adds to it, so that counting needs no launch."""


@dataclass
class RunState:
    """State that is kept for one run."""

    counts: dict[str, LayerCounts]
    shortest: dict[str, int]
    """Keys from which sparse attention pays, by layer."""
    tokens: int = 0
    """Image tokens of the last call."""


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
        self.image = torch.empty(0, 0, dtype=torch.float32)
        """`[N, 0]`: image tokens among the keys. A shape, which compiled blocks take as it comes: the numbers
        that they find in an object are theirs for good."""
        self.shortest = 0
        """Keys from which sparse attention pays."""
        self.store: Any = None
        """Whose `totals` are sums over image keys, kept up to date; None: nobody keeps them."""
        self.count_into(LayerCounts(torch.device("cpu")))

    def count_into(self, counts: LayerCounts, paused: bool = False) -> None:
        """Count the next calls there."""
        self.counts, self.tally = counts.dense, counts.tally
        reason = PAUSED if paused else STEP if self.scheduled else LAYER
        self.dense_count = self.counts[reason]

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
            return self.module(
                q,
                k,
                v,
                text=text,
                text_tokens=k.shape[2] - tokens,
                scale=scale,
                state=None if self.store is None else self.store.totals,
                tally=self.tally,
            )
        return None


class SparseAttention(Method):
    """Sparse attention of a whole transformer.

    In a sampling loop the first steps are dense, as `config.dense_steps` says. Outside of one (training, a
    call by hand) every scheduled layer runs sparse in every call, and gradients flow.

    Args:
        config: settings.
        weights: state dicts of the layers' modules, by the name of the layer; None: initial ones.
    """

    name = "sla"
    uses_attention = True

    def __init__(
        self, config: SLAConfig, weights: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.layers: dict[str, LayerAttention] = {}
        self._attention: dict[str, nn.Module] = {}
        self.reordered = None if config.order == "raster" else Reordered()
        self._reorders = False
        self._paused = False
        self._state: RunState | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager in which every layer runs dense, counted as "paused"."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def focus(self) -> Reordered | None:  # type: ignore[override]
        return self.reordered

    def make_layers(self, layers: Mapping[str, AttentionLayer]) -> None:
        """Make a module for each self-attention layer.

        Raises:
            ValueError: the config names layers that are not there, or the weights do not fit.
        """
        count = len(layers)
        self.config.check_layers(count)
        made = {}
        for i, (name, layer) in enumerate(layers.items()):
            module = SparseLinearAttention(
                self.config,
                layer.module.heads,
                layer.head_dim,
                topk=self.config.layer_topk(i, count),
            )
            if self.weights:
                module.load_state_dict(dict(self.weights[name]))
            if isinstance(weight := getattr(layer.module.to_q, "weight", None), Tensor):
                module.to(weight.device if weight.device.type != "meta" else "cpu")
            made[name] = LayerAttention(module, not self.config.is_dense_layer(i, count))
        self.layers = made
        self._attention = {name: layer.module for name, layer in layers.items()}

    def attach(self, host: Host) -> None:
        if not self.layers:  # attached for the second time, it keeps what it has learned
            self.make_layers(host.layers)
        self._reorders = self.reordered is not None and host.focus is self.reordered
        for name, layer in host.layers.items():
            processor, ours = layer.module.processor, self.layers[name]
            processor.attend = ours
            ours.store = None
            if self.config.has_weights and processor.kv_store is not None:
                processor.kv_store.feature_map = self.config.feature_map
                ours.store = processor.kv_store
        self.attach_weights()

    def detach(self) -> None:
        self.detach_weights()
        self._state = None

    @property
    def attention(self) -> dict[str, SparseLinearAttention]:
        """The modules by the name of the attention layer."""
        return {name: layer.module for name, layer in self.layers.items()}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return self.attention if self.config.has_weights else {}

    @property
    def config_in_use(self) -> SLAConfig:
        """Settings with the query block of the device that the last call ran on. Before any call: of a CPU."""
        device = torch.device("cpu")
        if self._state is not None:
            device = next(iter(self._state.counts.values())).tally.device
        return replace(self.config, block_q=query_block(self.config, device))

    def set_router(self, router: Callable[..., Tensor]) -> None:
        """Rank key blocks otherwise; it takes the arguments of `block_scores`."""
        for layer in self.layers.values():
            layer.module.router = router

    def attach_weights(self) -> None:
        """Make weights part of the transformer, as the submodule `sla` of each attention layer."""
        if self.config.has_weights:
            for name, module in self._attention.items():
                module.add_module("sla", self.layers[name].module)

    def detach_weights(self) -> None:
        """Undo `attach_weights`."""
        for name, module in self._attention.items():
            if module._modules.get("sla") is self.layers[name].module:
                del module.sla

    def begin_run(self, run: Run) -> None:
        run.states[self.name] = None  # the device is known with the first call

    @torch.inference_mode(False)  # counts go on in calls with gradients
    def begin_call(self, run: Run, call: Call) -> None:
        device = call.hidden_states.device
        state: RunState | None = run.states[self.name]
        if state is None:
            state = run.states[self.name] = RunState(
                {name: LayerCounts(device) for name in self.layers},
                {name: self._shortest(layer, device) for name, layer in self.layers.items()},
            )
        self._state = state
        state.tokens = math.prod(call.grid)
        dense_step = run.num_steps is not None and run.step < num_steps_of(
            self.config.dense_steps, run.num_steps
        )
        image = torch.empty(state.tokens, 0, dtype=torch.float32, device=device)
        for name, layer in self.layers.items():
            layer.image = image
            layer.dense = self._paused or dense_step or not layer.scheduled
            layer.shortest = state.shortest[name]
            layer.count_into(state.counts[name], self._paused)
        if self._reorders and self.reordered is not None:
            self.reordered.begin_call(call, self.order(call.grid, device))

    def end_call(self, run: Run, call: Call, output: Any) -> None:
        if self.reordered is not None:
            self.reordered.end_call()
        for layer in self.layers.values():
            layer.module.keep_measured()

    def order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        """The order that the tokens of this grid run in; None: raster, as where no layer runs sparse."""
        tile = self.config.tile_of(grid, query_block(self.config, device))
        return tile_order(grid, tile, device) if tile and self._pays(grid, device) else None

    def tile(self, grid: tuple[int, int, int], device: torch.device) -> int | None:
        """Tokens of this grid that are best selected together: query blocks, if any layer runs sparse."""
        return query_block(self.config, device) if self._pays(grid, device) else None

    def _pays(self, grid: tuple[int, int, int], device: torch.device) -> bool:
        tokens = math.prod(grid)
        return (
            not self._paused
            and tokens > self.config.block_k
            and any(
                layer.scheduled and self._shortest(layer, device) <= tokens
                for layer in self.layers.values()
            )
        )

    def _shortest(self, layer: LayerAttention, device: torch.device) -> int:
        config = self.config
        if config.crossover == "never":
            return 0
        topk = layer.module.topk
        assert topk is not None  # `top_p` goes with "never"
        return min_sparse_length(device.type, topk=topk, block=config.block_k)

    def rows(self, host: Host, run: Run | None) -> AttentionSummary:
        """Return the counts of each layer in the last run. Waits for the device."""
        state = self._state
        layers = [self._layer_summary(name, layer, state) for name, layer in self.layers.items()]
        cross = len(host.family.cross_attention(host.transformer))
        return AttentionSummary(self.config_in_use.to_dict(), layers, cross)

    def idle(self, run: Run) -> str | None:
        state: RunState = run.states[self.name]
        counts = state.counts.values()
        if int(torch.stack([x.tally[0] for x in counts]).sum()):
            return None
        dense = torch.stack([x.dense for x in counts]).sum(0).tolist()
        shortest = min(state.shortest.values())
        return ", ".join(self._dense_calls(dense, state.tokens, shortest))

    def _dense_calls(self, calls: list[int], tokens: int, shortest: int) -> dict[str, int]:
        named = {
            LAYER: "dense layer",
            STEP: "dense step",
            MASK: "attention mask",
            SHORT: f"one block: {tokens} tokens, block_k={self.config.block_k}",
            CROSSOVER: f"crossover='auto': {tokens} tokens, sparse {_from(shortest)}",
            PAUSED: "paused",
        }
        return {text: calls[i] for i, text in named.items() if calls[i]}

    def _layer_summary(
        self, name: str, layer: LayerAttention, state: RunState | None
    ) -> LayerSummary:
        if state is None:
            return LayerSummary(name, layer.scheduled, 0, {}, None)
        counts = state.counts[name]
        sparse, attended, pairs = counts.tally.tolist()
        return LayerSummary(
            name=name,
            scheduled=layer.scheduled,
            sparse_calls=sparse,
            dense_calls=self._dense_calls(
                counts.dense.tolist(), state.tokens, state.shortest[name]
            ),
            density=attended / pairs if pairs else None,
        )


def _from(shortest: int) -> str:
    return "was not measured to win" if shortest == NEVER else f"from {shortest} on"
