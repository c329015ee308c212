"""Plugin lookup: finds the subclasses of a base class in the modules of a package, by their `name`."""

import dataclasses
import importlib
import pkgutil
from functools import cache
from typing import Any, TypeVar

from dit_accel.config.base import suggest

T = TypeVar("T")


@cache
def classes_in(package: str, base: type[T]) -> dict[str, type[T]]:
    """Import all modules of a package and return the subclasses of `base` that define `name`, by this name."""
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
    """Return the class with a name.

    Args:
        role: argument that the error names, such as "pattern".
        name: name of the class.
        kinds: classes by name, see `classes_in`.

    Raises:
        ValueError: no class has this name.
    """
    if name not in kinds:
        raise ValueError(
            f"{role}={name!r}: no such {role}{suggest(name, list(kinds))}; must be one of {', '.join(kinds)}"
        )
    return kinds[name]


def with_options(
    kind: type[T], name: str, options: dict[str, Any] | None, argument: str = "options"
) -> T:
    """Return an instance of a dataclass whose fields are options.

    Args:
        kind: the dataclass.
        name: name of the class in error messages.
        options: field values. Default: the defaults of the class.
        argument: argument that errors name.

    Raises:
        ValueError: an option does not exist or has an invalid value.
    """
    fields = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for key in options or {}:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(
                f"{argument}: {name} has no option {key!r}{suggest(key, fields)}; must be one of {known}"
            )
    return kind(**(options or {}))
