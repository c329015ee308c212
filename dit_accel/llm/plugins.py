"""Classes that are found by their names in the files of a package: a new file is a new choice."""

import dataclasses
import importlib
import pkgutil
from functools import cache
from typing import Any, TypeVar

from dit_accel.config.base import suggest

T = TypeVar("T")


@cache
def classes_in(package: str, base: type[T]) -> dict[str, type[T]]:
    """Return the subclasses of a class in the files of a package that have a `name`, by this name."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    found: dict[str, type[T]] = {}
    waiting = list(base.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith(package) and "name" in vars(kind):
            found[vars(kind)["name"]] = kind
    return dict(sorted(found.items()))


def class_named(role: str, name: str, kinds: dict[str, type[T]]) -> type[T]:
    """Return a class by its name.

    Args:
        role: word for it in messages.
        name: name of the class.
        kinds: see `classes_in`.

    Raises:
        ValueError: no such class.
    """
    if name not in kinds:
        raise ValueError(
            f"{role}={name!r}: no such {role}{suggest(name, list(kinds))}; accepted are {', '.join(kinds)}"
        )
    return kinds[name]


def with_options(
    kind: type[T], name: str, options: dict[str, Any] | None, argument: str = "options"
) -> T:
    """Return an object of a dataclass whose fields are options.

    Args:
        kind: the dataclass.
        name: its name, for messages.
        options: values of fields. Default: as they are.
        argument: name of the setting that holds them, for messages.

    Raises:
        ValueError: no such option, or a value that it does not accept.
    """
    fields = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for key in options or {}:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(
                f"{argument}: {key!r} is no option of {name}{suggest(key, fields)}; accepted are {known}"
            )
    return kind(**(options or {}))
