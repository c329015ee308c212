"""`sample_of`, `Form`: the tensor in a return value of a transformer, and the type around it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def sample_of(output: Any) -> Tensor | None:
    """Return the tensor in a return value: the value itself, or the only entry of a tuple or a diffusers output.

    None if there is no tensor or more than one.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        values: Any = output.values()
    elif isinstance(output, tuple):
        values = output
    else:
        return None
    found = [x for x in values if x is not None]
    return found[0] if len(found) == 1 and isinstance(found[0], Tensor) else None


class Form:
    """Type and structure of a return value, without its tensor."""

    def __init__(self, output: Any) -> None:
        self._tuple = tuple(x is not None for x in output) if isinstance(output, tuple) else None
        self._names = (
            {name: x is not None for name, x in output.items()}
            if isinstance(output, Mapping)
            else None
        )
        self._type = type(output)

    def fill(self, sample: Tensor) -> Any:
        """Return a value of this structure that holds `sample`."""
        if self._names is not None:
            return self._type(**{k: sample if used else None for k, used in self._names.items()})
        if self._tuple is not None:
            return tuple(sample if used else None for used in self._tuple)
        return sample
