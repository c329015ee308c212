"""`answered_class`: a transformer's class whose calls a method may answer without running the transformer."""

from functools import cache
from typing import Any

import torch
from torch import nn

_MARK = "_dit_accel_answered"


@cache
def answered_class(cls: Any) -> Any:
    """Return a subclass that asks the transformer's `Installation` before each call.

    No hook of torch can leave a call out, and `forward` belongs to offloading, which replaces it. The subclass has
    the name, the module and everything else of `cls`, and no state: `transformer.__class__ = answered_class(cls)` puts it
    on, `plain_class` tells what to put back. It wraps what offloading, caches and compiling do to `forward`, so that
    all of it is left out with the call.
    """

    # Not traced: a compiled transformer is then compiled inside of this call. And no super(): torch.compile keeps this
    # function, also for a transformer that has its former class again.
    @torch.compiler.disable(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = _answer(self, args, kwargs)
        return cls.__call__(self, *args, **kwargs) if answer is None else answer

    # A transformer that was compiled before it got this class is called here: torch.compile kept its __call__.
    @torch.compiler.disable(recursive=False)
    def _call_impl(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = _answer(self, args, kwargs)
        return cls._call_impl(self, *args, **kwargs) if answer is None else answer

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Pickle and deepcopy find a class by its name, which is that of the class behind.
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
    """Return a metaclass whose classes equal the class behind them.

    `type(transformer) in types` is how `from_pipe` of diffusers finds the components of a pipeline.
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
    """Return the class behind one of `answered_class`; any other class itself."""
    return vars(cls).get(_MARK, cls)


@torch.compiler.disable
def _answer(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    for hook in transformer._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if owner is not None and hasattr(owner, "answer"):
            return owner.answer(transformer, args, kwargs)
    return None
