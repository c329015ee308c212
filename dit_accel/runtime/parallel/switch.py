"""`Parallelism`: context parallelism of diffusers on an accelerated transformer, taken over and given back."""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from dit_accel.models import AttentionLayer, TokenSelection
from dit_accel.runtime.parallel.group import Group
from dit_accel.runtime.parallel.selection import SharedTokens

ADAPTED = ".base_layer"
"""Suffix that PEFT adds to the name of a module that it wraps."""


def parallel_config_of(transformer: Any, layers: dict[str, AttentionLayer]) -> Any:
    """Return the `ParallelConfig` of diffusers on a transformer, or on its attention processors; None: there is none."""
    owners = (transformer, *(x.module.processor for x in layers.values()))
    found = (getattr(x, "_parallel_config", None) for x in owners)
    return next((x for x in found if x is not None), None)


def group_of(config: Any) -> Group | None:
    """Return the processes of a `ParallelConfig` of diffusers; None: no context parallelism.

    Raises:
        ValueError: the transformer is parallel in a way that acceleration cannot follow.
    """
    if getattr(config, "tensor_parallel_config", None) is not None:
        raise ValueError(
            "transformer: tensor parallelism is on, which acceleration does not follow; accepted is "
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
    """A hook of diffusers that splits or gathers tokens."""

    module: str
    """Name of its module, adapters left out; a reference would keep the model alive."""
    name: str
    hook: Any


class Parallelism:
    """Context parallelism of an accelerated transformer, in place of the hooks of diffusers.

    diffusers splits the sequence once, for all of a model. Acceleration selects and orders tokens first, and puts the
    output together before it is completed, so its own hooks share the tokens. What diffusers had installed is put back
    by `remove`.

    Args:
        transformer: transformer with context parallelism of diffusers.
        group: its processes.
        selection: selection that selects and orders the tokens; None: all tokens, in raster order.
        layers: self-attention layers by name.

    Raises:
        ValueError: the heads cannot be shared.
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
        """Give diffusers its hooks back.

        Some models of diffusers have no plan of context parallelism, or processors that would see only the tokens of
        their process. Parallelism then ends with acceleration, and every process computes all of a call.

        Args:
            transformer, layers: as before.
            ends: whether acceleration ends; else other methods replace the present ones.
        """
        if parallel_config_of(transformer, layers) is None:  # somebody ended it
            return
        if not self._removed or not _exchange_heads(layers):
            if not ends:
                return
            vars(transformer).pop("_parallel_config", None)  # that of the class is None
            warnings.warn(
                f"context parallelism of {type(transformer).__name__} ended with acceleration: diffusers alone "
                "does not know it for this model, so that every process computes whole calls now",
                stacklevel=2,
            )
            return
        from diffusers.hooks import HookRegistry

        for x in self._removed:
            # An adapter such as LoRA may have come, or gone, in the meantime: its output has to be gathered too.
            module = transformer.get_submodule(x.module)
            HookRegistry.check_if_exists_or_initialize(module).register_hook(x.hook, x.name)
        self._removed = []


def knows_parallelism(transformer: Any, layers: dict[str, AttentionLayer]) -> bool:
    """Return whether diffusers alone can share the calls of this model."""
    return getattr(type(transformer), "_cp_plan", None) is not None and _exchange_heads(layers)


def _exchange_heads(layers: dict[str, AttentionLayer]) -> bool:
    """Return whether the attention processors of diffusers exchange heads."""
    stock = (getattr(x.module.processor, "stock", x.module.processor) for x in layers.values())
    return all(hasattr(x, "_parallel_config") for x in stock)
