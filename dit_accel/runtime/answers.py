"""`answered_class`: subclass of a transformer class whose calls a method may answer without running the transformer."""

from functools import cache
from typing import Any

import torch
from torch import nn

_MARK = "_dit_accel_answered"


@cache
def answered_class(cls: Any) -> Any:
    """Return a subclass that asks the transformer's `Installation` before each call.

    Hooks of torch cannot skip a call, and offloading replaces `forward`. The subclass has the name and the module of
    `cls` and no state. `transformer.__class__ = answered_class(cls)` installs it, and `plain_class` returns the class to
    restore. An answered call skips everything that offloading, caches and compilation do in `forward`.
    """

    # Not traced, so that a compiled transformer is compiled inside this call. No super(), because torch.compile keeps
    # this function even after the transformer has its former class again.
    @torch.compiler.disable(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = _answer(self, args, kwargs)
        return cls.__call__(self, *args, **kwargs) if answer is None else answer

    # Entry point of a transformer that was compiled before: torch.compile kept the __call__ of its former class.
    @torch.compiler.disable(recursive=False)
    def _call_impl(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = _answer(self, args, kwargs)
        return cls._call_impl(self, *args, **kwargs) if answer is None else answer

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Pickle and deepcopy find a class by its name, and the subclass has the name of its parent.
        _, _, *rest = super(answered, self).__reduce_ex__(protocol)
        return (_blank, (cls,), *rest)

    namespace = {
        "__call__": __call__,
        "_call_impl": _call_impl,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        _MARK: cls,
    }
    meta: Any = type(cls)
    answered = _metaclass(meta)(cls.__name__, (cls,), namespace)
    return answered


@cache
def _metaclass(meta: Any) -> Any:
    """Return a metaclass whose classes equal the class that they wrap.

    `from_pipe` of diffusers finds the components of a pipeline with `type(transformer) in types`.
    """

    def __eq__(cls: Any, other: Any) -> bool:
        return cls is other or getattr(cls, _MARK) is other

    def __hash__(cls: Any) -> int:
        return hash(getattr(cls, _MARK))

    return type(meta.__name__, (meta,), {"__eq__": __eq__, "__hash__": __hash__})


def _blank(cls: Any) -> nn.Module:
    """Return an instance without attributes, for a copy."""
    answered = answered_class(cls)
    return answered.__new__(answered)


def plain_class(cls: Any) -> Any:
    """Return the class that `answered_class` wrapped, or any other class itself."""
    return vars(cls).get(_MARK, cls)


@torch.compiler.disable
def _answer(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    for hook in transformer._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if owner is not None and hasattr(owner, "answer"):
            return owner.answer(transformer, args, kwargs)
    return None
