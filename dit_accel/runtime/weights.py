"""`weights_state`: notices that a transformer's weights change in mid-run."""

from collections.abc import Collection, Hashable, Iterator
from typing import Any

from torch import Tensor, nn


def weights_state(transformer: nn.Module, leave_out: Collection[nn.Module] = ()) -> Hashable:
    """A value that changes when weights or LoRA adapters do; cheap, and without a device sync.

    It covers adapters that are loaded, deleted, switched, scaled, fused or unfused (PEFT), and weights that are
    written in place (`load_state_dict`) or replaced. Weights that an offloading hook moves are not looked at: their
    tensors change in every call.

    Args:
        transformer: the module.
        leave_out: modules in it whose weights do not count.
    """
    state: list[Hashable] = []
    versions, places, offloaded = 0, 0, False
    # `__dict__`, not hasattr: this runs in every call, and a module's __getattr__ is slow.
    for module in _modules(transformer, leave_out):
        attributes = module.__dict__
        if "merged_adapters" in attributes:
            state.append(_adapters(module))
        if "_hf_hook" in attributes or _is_group_offloaded(attributes.get("_diffusers_hook")):
            offloaded = True
        for x in attributes["_parameters"].values():
            if x is not None:
                versions += _version(x)
                places += _place(x)
    if not offloaded:
        state += [versions, places]
    return tuple(state)


def _modules(module: nn.Module, leave_out: Collection[nn.Module]) -> Iterator[nn.Module]:
    todo = [module]
    while todo:
        module = todo.pop()
        todo.extend(x for x in module._modules.values() if x is not None and x not in leave_out)
        yield module


def _is_group_offloaded(registry: Any) -> bool:
    return registry is not None and "group_offloading" in registry.hooks


def _adapters(layer: Any) -> Hashable:
    """What a LoRA layer of PEFT applies."""
    scaling = getattr(layer, "scaling", {})
    return (
        tuple(layer.active_adapters),
        tuple(layer.merged_adapters),
        bool(layer.disable_adapters),
        tuple((name, float(x)) for name, x in scaling.items()),
    )


def _version(x: Any) -> int:
    # Tensors made in inference mode have no counter, and cannot be written in place either.
    return 0 if x.is_inference() else x._version


def _place(x: Any) -> int:
    """Where its values are. Tensors of other classes (quantised ones) may not be one piece of memory."""
    return x.data_ptr() if type(x) in (Tensor, nn.Parameter) else id(x)
