"""`SparseAttention`: the method of sparse attention, with its schedule of layers and steps, and its counts."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.config import SLAConfig, num_steps_of
from dit_accel.config.base import check_fraction
from dit_accel.models import AttentionLayer, Call, TokenOrder
from dit_accel.runtime.method import Host, Method
from dit_accel.runtime.run import Run
from dit_accel.runtime.swap import WeightSwap
from dit_accel.sla.attention import SparseLinearAttention
from dit_accel.sla.crossover import NEVER, min_sparse_length
from dit_accel.sla.geometry import query_block
from dit_accel.sla.layer import (
    CROSSOVER,
    LAYER,
    MASK,
    PAUSED,
    SHORT,
    STEP,
    LayerAttention,
    LayerCounts,
    Observer,
)
from dit_accel.sla.order import Reordered, tile_order
from dit_accel.sla.summary import AttentionSummary, LayerSummary


@dataclass
class RunState:
    """State of one run."""

    counts: dict[str, LayerCounts]
    """Counts by the name of the layer."""
    shortest: dict[str, int]
    """Number of keys from which sparse attention is faster, by the name of the layer."""
    topk: float | int | None
    """`topk` for which `shortest` was computed."""
    tokens: int = 0
    """Number of image tokens of the last call."""


class SparseAttention(Method):
    """Sparse attention of a transformer.

    In a sampling loop the first steps are dense, see `SLAConfig.dense_steps`. Outside of sampling loops (training, single
    calls) every scheduled layer runs sparse in every call, and gradients flow.

    Args:
        config: settings.
        weights: state dicts of the layers' modules, by the name of the layer. Missing weights have their initial values.
            Default: all weights are missing.
        swap: values of the transformer's own weights that were trained together with `weights`. Default: none.
    """

    name = "sla"
    uses_attention = True

    def __init__(
        self,
        config: SLAConfig,
        weights: Mapping[str, Mapping[str, Tensor]] | None = None,
        *,
        swap: WeightSwap | None = None,
    ) -> None:
        self.config = config
        self.swap = swap
        self.weights = weights
        self.layers: dict[str, LayerAttention] = {}
        self._attention: dict[str, nn.Module] = {}
        self.reordered = Reordered()
        self._reorders = False
        self._state: RunState | None = None
        self._pauses = 0

    @property
    def selection(self) -> Reordered:  # type: ignore[override]
        return self.reordered

    def make_layers(self, layers: Mapping[str, AttentionLayer]) -> None:
        """Make a module for each self-attention layer.

        Raises:
            ValueError: the config names layers that do not exist, or the weights do not fit.
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
                _load(module, self.weights[name], name)
            if isinstance(weight := getattr(layer.module.to_q, "weight", None), Tensor):
                module.to(weight.device if weight.device.type != "meta" else "cpu")
            made[name] = LayerAttention(module, not self.config.is_dense_layer(i, count))
        self.layers = made
        self._attention = {name: layer.module for name, layer in layers.items()}

    def attach(self, host: Host) -> None:
        if not self.layers:  # attached again, the method keeps its weights
            self.make_layers(host.layers)
        self._reorders = host.selection is self.reordered
        for name, layer in host.layers.items():
            processor, ours = layer.module.processor, self.layers[name]
            processor.attend = ours
            ours.store = None
            if self.config.has_linear_branch and processor.kv_store is not None:
                processor.kv_store.feature_map = self.config.feature_map
                ours.store = processor.kv_store
        self.attach_weights()

    def detach(self) -> None:
        self.detach_weights()
        self._state = None

    @property
    def attention(self) -> dict[str, SparseLinearAttention]:
        """Modules by the name of the attention layer."""
        return {name: layer.module for name, layer in self.layers.items()}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return self.attention if self.config.has_weights else {}

    @property
    def config_in_use(self) -> SLAConfig:
        """Settings with the query block of the last call's device; before any call, that of a CPU."""
        device = torch.device("cpu")
        if self._state is not None:
            device = next(iter(self._state.counts.values())).tally.device
        return replace(self.config, block_q=query_block(self.config, device))

    def set_router(self, router: Callable[..., Tensor]) -> None:
        """Replace the function that ranks key blocks; it takes the arguments of `block_scores`."""
        for layer in self.layers.values():
            layer.module.router = router

    def set_topk(self, value: float | int) -> None:
        """Change the fraction of key blocks that is read, from the next call on. Annealing uses this.

        Modules are not made again, and compiled blocks serve every fraction. `config` and the summary get the new value.
        Layers in `topk_by_layer` keep their value.

        Args:
            value: new `topk`, in (0, 1].

        Raises:
            ValueError: the value is not in (0, 1], or the config has topk=None.
        """
        if self.config.topk is None:
            raise ValueError(
                f"topk={value!r}: the config has topk=None, so top_p alone decides; accepted if the config has a topk"
            )
        check_fraction("topk", value)
        self.config = replace(self.config, topk=value)
        count = len(self.layers)
        for i, layer in enumerate(self.layers.values()):
            layer.module.topk = self.config.layer_topk(i, count)

    def set_learning_step(self, step: int | None) -> None:
        """Let a learned router learn from a subset of the query blocks in each step, which reduces its cost.

        Before the first call of this function, the router learns from every query block, which costs as much as dense
        attention. The subset is a function of the step, so that a resumed run uses the same ones.

        Args:
            step: number of the optimiser step, >= 0. None: every query block again.
        """
        for layer in self.layers.values():
            if self.config.router == "learned":
                layer.module.learned_router.every_row = step is None
                layer.module.learned_router.step.fill_(step or 0)

    @contextlib.contextmanager
    def paused(self, observers: Mapping[str, Observer] | None = None) -> Iterator[None]:
        """Context manager in which every layer runs dense. The summary counts these calls as "paused".

        It may be nested. At its end, layers have their former state, so that a following backward pass with gradient
        checkpointing recomputes the call before it. Compiled blocks have one more graph for dense calls, as for dense
        steps.

        Args:
            observers: functions by the name of a layer. Each is called with `(q, k, v, text=..., text_tokens=...,
                scale=...)` of every call that would have run sparse, and with `text_lengths` if texts are padded.
                Default: none.
        """
        before = [(layer, layer.call_state()) for layer in self.layers.values()]
        self._pauses += 1
        for name, observer in (observers or {}).items():
            self.layers[name].observer = observer
        try:
            yield
        finally:
            self._pauses -= 1
            for layer, state in before:
                vars(layer).update(state)

    def attach_weights(self) -> None:
        """Add the modules with weights to the transformer, as the submodule `sla` of each attention layer."""
        if self.config.has_weights:
            for name, module in self._attention.items():
                module.add_module("sla", self.layers[name].module)

    def detach_weights(self) -> None:
        """Undo `attach_weights`."""
        for name, module in self._attention.items():
            if module._modules.get("sla") is self.layers[name].module:
                del module.sla

    def begin_run(self, run: Run) -> None:
        run.states[self.name] = None  # made in the first call, when the device is known

    @torch.inference_mode(False)  # the count tensors are also used in calls with gradients
    def begin_call(self, run: Run, call: Call) -> None:
        device = call.hidden_states.device
        state: RunState | None = run.states[self.name]
        if state is None:
            state = run.states[self.name] = RunState(
                {name: LayerCounts(device) for name in self.layers}, {}, None
            )
        if not state.shortest or state.topk != self.config.topk:
            state.topk = self.config.topk
            state.shortest = {
                name: self._shortest(layer, device) for name, layer in self.layers.items()
            }
        self._state = state
        state.tokens = math.prod(call.grid)
        dense_step = run.num_steps is not None and run.step < num_steps_of(
            self.config.dense_steps, run.num_steps
        )
        paused = self._pauses > 0
        keys = -(-state.tokens // self.config.block_k)
        image = torch.empty(state.tokens, 0, dtype=torch.float32, device=device)
        for name, layer in self.layers.items():
            layer.image = image
            layer.module.processes = call.processes
            blocks = layer.module.blocks_read(keys)
            layer.blocks = None if blocks is None else image.new_empty(blocks + 1, 0)
            layer.dense = paused or dense_step or not layer.scheduled
            layer.shortest = state.shortest[name]
            layer.count_into(state.counts[name], paused=paused)
        if self._reorders:
            self.reordered.begin_call(call, self.order(call.grid, device))

    def end_call(self, run: Run, call: Call, output: Any) -> None:
        self.reordered.end_call()
        for layer in self.layers.values():
            layer.module.keep_measured()

    def order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        """Return the order in which tokens of this grid run; None (raster order) if no layer runs sparse."""
        tile = self.config.tile_of(grid, query_block(self.config, device))
        return tile_order(grid, tile, device) if tile and self._pays(grid, device) else None

    def tile(self, grid: tuple[int, int, int], device: torch.device) -> int | None:
        """Return the size of a query block as the number of tokens to select together; None if no layer runs sparse."""
        return query_block(self.config, device) if self._pays(grid, device) else None

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

    def rows(self, host: Host, run: Run | None) -> AttentionSummary:
        """Return the counts of each layer in the last run. This waits for the device."""
        known = run is None or run.states.get(self.name) is self._state
        state = self._state if known else None
        layers = [self._layer_summary(name, layer, state) for name, layer in self.layers.items()]
        cross = len(host.family.cross_attention(host.transformer))
        # Each cross-attention module runs once in every call of the transformer.
        calls = cross * max((x.calls for x in layers), default=0)
        return AttentionSummary(self.config_in_use.to_dict(), layers, cross, calls)

    def unscheduled(self, run: Run) -> tuple[str, str] | None:
        steps = run.num_steps
        if steps is None or self._pauses or num_steps_of(self.config.dense_steps, steps) < steps:
            return None
        numbers = f"{steps} steps, dense_steps={self.config.dense_steps}"
        return "every step is a dense step", f"{numbers}; sla='few-step' has no dense steps"

    def idle(self, run: Run) -> str | None:
        state: RunState = run.states[self.name]
        counts = state.counts.values()
        if int(torch.stack([x.tally[0] for x in counts]).sum()):
            return None
        dense = torch.stack([x.dense for x in counts]).sum(0).tolist()
        if not any(dense[:PAUSED]):
            return None  # all dense calls were paused ones
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


def _load(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Load weights of a layer. Missing weights stay unchanged."""
    unexpected = module.load_state_dict(dict(weights), strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"weights: layer {name} has no {', '.join(unexpected)}")


def _from(shortest: int) -> str:
    return "was not measured to win" if shortest == NEVER else f"from {shortest} on"
