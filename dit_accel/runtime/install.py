"""`install`, `uninstall` and look-ups: the acceleration on a pipeline or transformer."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dit_accel.runtime.clock import Clock
from dit_accel.runtime.components import parts_of
from dit_accel.runtime.installation import Installation
from dit_accel.runtime.method import Method
from dit_accel.runtime.target import module_of, transformer_of


def install(
    target: Any,
    methods: Iterable[Method],
    *,
    replaced: Installation | None = None,
    pipe: Any = None,
) -> Installation:
    """Put methods on a transformer.

    Args:
        target: a transformer, a wrapper of one (DDP, PEFT, torch.compile), or a pipeline.
        methods: all methods that are to be on.
        replaced: acceleration that is on now. If the installation fails, it stays on.
        pipe: pipeline of the transformer, if `target` is not the pipeline.

    Raises:
        ValueError: the transformer or its processors are not supported, or the methods do not work together.
    """
    methods = list(methods)
    transformer = transformer_of(target, any_model=not any(x.needs_family for x in methods))
    clock = Clock() if replaced is None else replaced.clock
    if replaced is not None:
        kept = [x.swap for x in methods if x.swap is not None]
        replaced.remove(transformer, keep=kept, ends=False)
        clock.forget()
    try:
        installation = Installation(transformer, methods, clock)
    except BaseException:
        if replaced is not None:
            Installation(transformer, replaced.methods.values(), clock)
        raise
    if pipe is None and target is not transformer and hasattr(target, "scheduler"):
        pipe = target
    if pipe is not None:
        clock.follow(pipe)
    return installation


def uninstall(target: Any) -> None:
    """Take all methods off. Nothing happens if none is on."""
    for part in parts_of(target).values():
        found = _find(part)
        if found is not None:
            transformer, installation = found
            installation.remove(transformer)


def installation_of(target: Any) -> Installation | None:
    """Return the acceleration on a transformer; None if it is off.

    Args:
        target: a transformer, a wrapper of one, or a pipeline. If the pipeline has two transformers, the first one.
    """
    found = _find(target)
    return None if found is None else found[1]


def installations_of(target: Any) -> dict[str, Installation]:
    """Return the acceleration on each transformer of a target, by the names of `parts_of`; empty if it is off."""
    found = {name: installation_of(part) for name, part in parts_of(target).items()}
    return {name: x for name, x in found.items() if x is not None}


def method_of(target: Any, name: str) -> Any:
    """Return the method of this name; None if it is off. `target` as in `installation_of`."""
    installation = installation_of(target)
    return None if installation is None else installation.methods.get(name)


def original_weights(transformer: Any) -> dict[str, Tensor]:
    """Return by name the values of weights before acceleration changed them; empty if it changed none."""
    installation = installation_of(transformer)
    swaps = [] if installation is None else installation.swaps
    return {name: x for swap in swaps for name, x in swap.originals.items()}


def _find(target: Any) -> tuple[Any, Installation] | None:
    """Return the accelerated transformer and its installation; `target` as in `installation_of`."""
    module = module_of(target)
    if module is None:
        return None
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            if isinstance(owner := getattr(hook, "__self__", None), Installation):
                return inner, owner
    return None
