"""Checks of settings that name layers of a model: the first n, or indices that may count from the end."""

from typing import Any

from dit_accel.config.base import check, is_int

ACCEPTED = "an int >= 0 or a list of layer indices"


def check_layers(name: str, value: Any) -> int | tuple[int, ...]:
    """Return a setting of layers as an int or a tuple.

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
    """Return whether a setting includes a layer.

    Args:
        name: name of the setting, for errors.
        value: the first n layers, or layer indices.
        layer: index of the layer, from 0.
        num_layers: number of layers of the model.

    Raises:
        ValueError: `value` names a layer that the model does not have.
    """
    if isinstance(value, int):
        if value > num_layers:
            raise ValueError(
                f"{name}={value}: accepted is an int from 0 to {num_layers}, the layers of the model"
            )
        return layer < value
    return layer in {layer_index(name, x, num_layers) for x in value}


def layer_index(name: str, layer: int, num_layers: int) -> int:
    """Return the non-negative index of a layer. A negative index counts from the end.

    Raises:
        ValueError: the model has no such layer.
    """
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"{name}: layer {layer}; accepted is -{num_layers} to {num_layers - 1}")
    return layer % num_layers
