"""`operator`: decorator that registers a function as `torch.ops.dit_accel.<name>` with a small cost per call."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# Functions behind the operators, by name. `dit_accel.bench.launches` follows their inner calls.
BODIES: dict[str, Callable[..., Any]] = {}


def operator(
    name: str, fake: Callable[..., Any], *, mutates: Iterable[str] = ()
) -> Callable[[Function], Function]:
    """Return a decorator that registers a function of tensors and numbers as an operator without a gradient.

    An operator of `torch.library.custom_op` costs 15 us of Python per call, mostly for gradients. This one costs 3 us.

    Args:
        name: name of the operator in the namespace `dit_accel`.
        fake: function of the same arguments that returns empty tensors of the right shapes.
        mutates: names of the arguments that the function writes to.

    Returns:
        A decorator that returns the function unchanged.
    """

    def register(function: Function) -> Function:
        qualified = f"dit_accel::{name}"
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd", function)
        torch.library.register_fake(qualified, fake)
        BODIES[name] = function
        return function

    return register
