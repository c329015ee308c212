"""`Stores`: stores of keys and values of all attention layers, and the caches of a context that they use."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.config import RASConfig
from dit_accel.kernels import LinearState
from dit_accel.models import AttentionLayer
from dit_accel.ras.context import ContextState
from dit_accel.ras.history import History, KVStore


def own_heads(layer: AttentionLayer, processes: Any) -> int:
    """Return the number of key heads that this process computes."""
    return layer.kv_heads if processes is None else processes.shares(layer.kv_heads)[processes.rank]


class Stores:
    """Stores of a transformer's self-attention layers. They are installed in the attention processors.

    Args:
        layers: self-attention layers by name.
        config: settings.
    """

    def __init__(self, layers: dict[str, AttentionLayer], config: RASConfig) -> None:
        self.layers = layers
        self.policy = config.kv_cache
        self.by_layer = {name: KVStore() for name in layers}
        for name, layer in layers.items():
            layer.module.processor.kv_store = self.by_layer[name]

    def close(self) -> None:
        """Disconnect the caches of the call in progress."""
        for store in self.by_layer.values():
            store.close()

    def point(
        self,
        context: ContextState,
        like: Tensor,
        layout: str,
        shape: tuple[int, int],
        index: Int[Tensor, " rn"] | None,
        factor: Float[Tensor, "r l"],
        same: Float[Tensor, "r l"] | None,
        *,
        linear: bool,
        text: int | None = 0,
        processes: Any = None,
    ) -> None:
        """Connect the caches of a context to the stores of the layers with this layout.

        Args:
            context: state of the context. It gets empty caches if it has none.
            like: empty tensor of the dtype and device of keys.
            layout: layout of the layers, see `AttentionLayer.layout`.
            shape: number of rows and number of tokens in a row.
            index: tokens that run, in the concatenated rows; None: all.
            factor: extrapolation factor of each token.
            same: 1 for tokens whose last update had this noise level, else 0; None: no token.
            linear: whether keys and values are extrapolated.
            text: number of tokens before the image in each row; None if it differs between rows.
            processes: see `Call.processes`; each process caches its own heads.
        """
        if index is not None:
            # A block that is compiled with the first count then serves all counts.
            torch._dynamo.maybe_mark_dynamic(index, 0)
        for name, layer in self.layers.items():
            if layer.layout != layout:
                continue
            heads = own_heads(layer, processes)
            if name not in context.kv:
                k, v = (
                    History(
                        *shape,
                        (heads, layer.head_dim),
                        like,
                        linear=linear,
                        policy=self.policy,
                    )
                    for _ in range(2)
                )
                context.kv[name] = (k, v)
            store = self.by_layer[name]
            totals = None
            if store.feature_map is not None and not linear and text is not None:
                totals = _totals(
                    context, name, (shape[0], heads, layer.head_dim), store.feature_map, like
                )
            store.open(
                context.kv[name],
                index,
                factor.flatten(),
                None if same is None else same.flatten(),
                totals,
                text or 0,
            )


def _totals(
    context: ContextState,
    name: str,
    shape: tuple[int, int, int],
    feature_map: str,
    like: Tensor,
) -> LinearState:
    """Return the sums over the context's image keys in one layer; zero at first."""
    if name not in context.totals:
        dtype = torch.promote_types(like.dtype, torch.float32)
        context.totals[name] = LinearState(
            like.new_zeros(*shape, shape[2], dtype=dtype),
            like.new_zeros(shape, dtype=dtype),
            feature_map,
        )
    return context.totals[name]
