"""`operator`: registers a function as `torch.ops.dit_accel.<name>`, at little cost per call."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# The functions behind the operators by name, for `dit_accel.bench.launches`, which follows their inner calls.
BODIES: dict[str, Callable[..., Any]] = {}


def operator(
    name: str, fake: Callable[..., Any], *, mutates: Iterable[str] = ()
) -> Callable[[Function], Function]:
    """Make a function of tensors and numbers an operator, without a gradient.

    `torch.library.custom_op` runs Python of its own around every call (15 us, this 3 us), most of it for
    gradients, which planning does not have.

    Args:
        name: in the namespace `dit_accel`.
        fake: the same arguments; returns empty tensors of the right shapes.
        mutates: names of the arguments that are written to.

    Returns:
        A decorator that returns the function as it is.
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
