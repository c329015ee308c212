"""Layers of a model as settings name them: the first n, or indices that may count from the end."""

from typing import Any

from dit_accel.config.base import check, is_int

ACCEPTED = "an int >= 0 or a list of layer indices"


def check_layers(name: str, value: Any) -> int | tuple[int, ...]:
    """Return layers as an int or a tuple.

    Raises:
        ValueError: the value is neither an int >= 0 nor a list of ints.
    """
    if is_int(value):
        check(name, value, value >= 0, ACCEPTED)
        return value
    ok = isinstance(value, list | tuple) and all(is_int(x) for x in value)
    check(name, value, ok, ACCEPTED)
    return tuple(value)


def in_layers(
    name: str, value: int | tuple[int, ...] | list[int], layer: int, num_layers: int
) -> bool:
    """Return whether a layer is one of them.

    Raises:
        ValueError: they name a layer that the model does not have.
    """
    if isinstance(value, int):
        if value > num_layers:
            raise ValueError(
                f"{name}={value}: accepted is an int from 0 to {num_layers}, the layers of the model"
            )
        return layer < value
    return layer in {layer_index(name, x, num_layers) for x in value}


def layer_index(name: str, layer: int, num_layers: int) -> int:
    """Return the index of a layer that may count from the end.

    Raises:
        ValueError: the model has no such layer.
    """
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"{name}: layer {layer}; accepted is -{num_layers} to {num_layers - 1}")
    return layer % num_layers
