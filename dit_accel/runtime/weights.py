"""`weights_state`: fingerprint of a transformer's weights, to detect changes during a run."""

from collections.abc import Collection, Hashable
from typing import Any

from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def weights_state(transformer: nn.Module, leave_out: Collection[nn.Module] = ()) -> Hashable:
    """Return a value that changes when weights, LoRA adapters or diffusers' hooks change, without a device sync.

    It covers PEFT adapters that are loaded, deleted, switched, scaled, fused or unfused, and weights that are written in
    place (`load_state_dict`) or replaced. It does not cover weights that offloading loads again for each call.

    Args:
        transformer: the module.
        leave_out: submodules to ignore.
    """
    state: list[Hashable] = []
    versions = places = 0
    moved = replaced = False
    # Called in every transformer call, so it is one loop, and reads `__dict__`: nn.Module.__getattr__ is slow.
    todo = [transformer]
    while todo:
        module = todo.pop()
        attributes = module.__dict__
        for child in attributes["_modules"].values():
            if child is not None and child not in leave_out:
                todo.append(child)
        if "merged_adapters" in attributes:
            state.append(_adapters(module))
        if "_hf_hook" in attributes:
            moved = True
            replaced = replaced or _replaces(attributes["_hf_hook"])
        if "_diffusers_hook" in attributes and (hooks := attributes["_diffusers_hook"].hooks):
            state.append(tuple(hooks))
            replaced = replaced or "group_offloading" in hooks
            moved = moved or "layerwise_casting" in hooks
        for x in attributes["_parameters"].values():
            if x is None:
                continue
            if type(x) not in PLAIN:  # quantised weights may have no single data pointer
                places += id(x)
            elif not x.is_inference():  # tensors made in inference mode have no version counter
                versions += x._version
                places += x.data_ptr()
    if not replaced:
        state.append(versions)
        if not moved:
            state.append(places)
    return tuple(state)


def lora_scale(arguments: dict[str, Any]) -> Hashable:
    """Return the LoRA scale in the arguments of a call; None if there is none."""
    for name in ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"):
        scale = (arguments.get(name) or {}).get("scale")
        if scale is not None:
            return float(scale)
    return None


def _replaces(hook: Any) -> bool:
    """Return whether a hook of accelerate loads weights for each call (sequential offloading)."""
    return getattr(hook, "offload", False) or any(map(_replaces, getattr(hook, "hooks", ())))


def _adapters(layer: Any) -> Hashable:
    """Return the state of a LoRA layer of PEFT: active, merged and disabled adapters, and their scales."""
    scaling = getattr(layer, "scaling", {})
    return (
        tuple(layer.active_adapters),
        tuple(layer.merged_adapters),
        bool(layer.disable_adapters),
        tuple((name, float(x)) for name, x in scaling.items()),
    )
