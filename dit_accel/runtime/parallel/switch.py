"""`Parallelism`: context parallelism of an accelerated transformer, in place of the hooks of diffusers."""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from dit_accel.models import AttentionLayer, TokenSelection
from dit_accel.runtime.parallel.group import Group
from dit_accel.runtime.parallel.selection import SharedTokens

ADAPTED = ".base_layer"
"""Suffix of the name of a module that PEFT wraps."""


def parallel_config_of(transformer: Any, layers: dict[str, AttentionLayer]) -> Any:
    """Return the `ParallelConfig` of a transformer or of its attention processors; None if there is none."""
    owners = (transformer, *(x.module.processor for x in layers.values()))
    found = (getattr(x, "_parallel_config", None) for x in owners)
    return next((x for x in found if x is not None), None)


def group_of(config: Any) -> Group | None:
    """Return the processes of a `ParallelConfig`; None if it has no context parallelism.

    Raises:
        ValueError: the config asks for tensor parallelism or ring attention.
    """
    if getattr(config, "tensor_parallel_config", None) is not None:
        raise ValueError(
            "transformer: tensor parallelism is on, which acceleration does not support; accepted is "
            "ContextParallelConfig(ulysses_degree=...)"
        )
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return None
    if (context.ring_degree or 1) > 1:
        raise ValueError(
            f"ring_degree={context.ring_degree}: in ring attention no process sees all keys of a head, and block scores, "
            "the linear branch and cached keys need them; accepted is ContextParallelConfig(ulysses_degree=...)"
        )
    mesh = context._ulysses_mesh
    return Group(
        mesh.get_group(), mesh.get_local_rank(), mesh.size(), bool(context.ulysses_anything)
    )


@dataclass
class _Removed:
    """A removed hook of diffusers that splits or gathers tokens."""

    module: str
    """Name of its module, without adapters. A reference to the module would keep the model alive."""
    name: str
    hook: Any


class Parallelism:
    """Context parallelism of an accelerated transformer, in place of the hooks of diffusers.

    diffusers splits the sequence once, with hooks on the model. Acceleration selects and orders tokens before the split,
    and completes the output after the gathering, so its own hooks split the tokens. `remove` restores the hooks of
    diffusers.

    Args:
        transformer: transformer with context parallelism of diffusers.
        group: processes of the transformer.
        selection: tokens on which calls run and their order; None: all tokens in raster order.
        layers: self-attention layers by name.

    Raises:
        ValueError: the heads cannot be split.
    """

    def __init__(
        self,
        transformer: nn.Module,
        group: Group,
        selection: TokenSelection | None,
        layers: dict[str, AttentionLayer],
    ) -> None:
        for name, layer in layers.items():
            group.check_heads(name, layer.kv_heads)
        self.group = group
        self.selection = SharedTokens(selection, group, {x.layout for x in layers.values()})
        self._removed: list[_Removed] = []
        for at, module in transformer.named_modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            for name, hook in list(getattr(registry, "hooks", {}).items()):
                if name.startswith(("cp_input---", "cp_output---")):
                    registry.remove_hook(name, recurse=False)
                    self._removed.append(_Removed(at.removesuffix(ADAPTED), name, hook))
        for layer in layers.values():
            layer.module.processor.exchange = self.selection.exchanges[layer.layout]

    def remove(
        self, transformer: Any, layers: dict[str, AttentionLayer], *, ends: bool = True
    ) -> None:
        """Restore the hooks of diffusers.

        Some models have no context-parallel plan in diffusers, or processors that do not exchange heads. For these
        models parallelism ends with acceleration, and every process computes whole calls.

        Args:
            transformer: the transformer.
            layers: self-attention layers by name.
            ends: whether acceleration ends. False if other methods replace the present ones.
        """
        if parallel_config_of(transformer, layers) is None:  # it was switched off in diffusers
            return
        if not self._removed or not _exchange_heads(layers):
            if not ends:
                return
            vars(transformer).pop("_parallel_config", None)  # the class attribute is None
            warnings.warn(
                f"context parallelism of {type(transformer).__name__} ended with acceleration: diffusers does not support "
                "it for this model, so every process computes whole calls now",
                stacklevel=2,
            )
            return
        from diffusers.hooks import HookRegistry

        for x in self._removed:
            # Look the module up again: an adapter such as LoRA may wrap it now, whose output has to be gathered too.
            module = transformer.get_submodule(x.module)
            HookRegistry.check_if_exists_or_initialize(module).register_hook(x.hook, x.name)
        self._removed = []


def knows_parallelism(transformer: Any, layers: dict[str, AttentionLayer]) -> bool:
    """Return whether diffusers supports context parallelism of this model without acceleration."""
    return getattr(type(transformer), "_cp_plan", None) is not None and _exchange_heads(layers)


def _exchange_heads(layers: dict[str, AttentionLayer]) -> bool:
    """Return whether the attention processors of diffusers exchange heads."""
    stock = (getattr(x.module.processor, "stock", x.module.processor) for x in layers.values())
    return all(hasattr(x, "_parallel_config") for x in stock)
