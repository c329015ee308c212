"""`Config`: base class that loads, saves and checks settings."""

import dataclasses
import difflib
import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

SECTIONS = ("ras", "sla", "prefill", "kv")
OFF = "none"
"""Settings string that turns a method off, for example on the command line."""


class Config:
    """Base class of the settings. Each subclass is one section of a YAML file."""

    SECTION: ClassVar[str]
    PRESETS: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def load(cls, source: Any) -> Any:
        """Read settings from any value that `sla=` and `ras=` of the public functions accept.

        Args:
            source: a config, a dict of its fields, a preset name, or the path of a YAML file. None or
                "none" turns the method off.

        Returns:
            The config, or None if the method is off.

        Raises:
            ValueError: `source` is of another kind, has an unknown key, or a field does not accept its value.
        """
        if source is None or source == OFF:
            return None
        if isinstance(source, cls):
            return source
        if isinstance(source, dict):
            return cls.from_dict(source)
        if isinstance(source, str) and source in cls.PRESETS:
            return cls(**cls.PRESETS[source])
        if isinstance(source, str | os.PathLike):
            if Path(source).is_file():
                return cls.from_yaml(source)
            names = [*cls.PRESETS, OFF]
            raise ValueError(
                f"{cls.SECTION}={str(source)!r}: no such preset or YAML file{suggest(str(source), names)}; "
                f"accepted are {', '.join(names)}, a YAML file, a dict or {cls.__name__}(...)"
            )
        raise ValueError(
            f"{cls.SECTION}={source!r}: accepted are a preset name, a YAML file, a dict or {cls.__name__}(...)"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Return a config from field names and values.

        Raises:
            ValueError: a key is unknown; the message suggests the nearest one. Or a field does not accept its value.
        """
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r}{suggest(str(key), names)}; accepted are {', '.join(names)}"
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> Any:
        """Read a config from its section of a YAML file, such as `sla:`. The keys are the names of the fields."""
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise ValueError(f"{path}: accepted is a mapping with the section {cls.SECTION}:")
        for key in data:
            if key not in SECTIONS:
                raise ValueError(
                    f"{path}: unknown section {key!r}{suggest(str(key), list(SECTIONS))}; accepted are {', '.join(x + ':' for x in SECTIONS)}"
                )
        if cls.SECTION not in data:
            raise ValueError(f"{path}: no section {cls.SECTION}:")
        if not isinstance(data[cls.SECTION], dict):
            raise ValueError(f"{path}: the section {cls.SECTION}: must hold keys and values")
        try:
            return cls.from_dict(data[cls.SECTION])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON or YAML. `from_dict` reads them back."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {key: as_lists(x) for key, x in values.items()}


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file.

    Two rules differ from PyYAML: a key that appears twice in one mapping is an error, and values such as 1e-1 and
    5E3 are numbers (YAML 1.2), not strings (YAML 1.1).

    Raises:
        ValueError: the file cannot be read, is not YAML, or has a key twice; the message names the key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            # Checked before the parent class expands the merge key "<<": its keys may be overridden.
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    value = self.construct_object(key)
                    if value in seen:
                        raise _DuplicateKeyError(key.value, key.start_mark.line + 1)
                    seen.add(value)
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # Loader is a SafeLoader
    except _DuplicateKeyError as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable YAML file ({error})") from error


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _DuplicateKeyError(Exception):
    def __init__(self, key: str, line: int) -> None:
        super().__init__(f"key {key!r} is given twice (line {line}); each key may appear once")


def num_steps_of(value: int | float, num_steps: int) -> int:
    """Return a number of steps: an int as it is, a float as a fraction of `num_steps`, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * num_steps - 1e-9)


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_share(value: Any) -> TypeGuard[float]:
    """Return whether a value is a float in (0, 1], a fraction where an int would be a number of tokens."""
    return isinstance(value, float) and 0 < value <= 1


def count_of(value: int | float, total: int) -> int:
    """Return a number: an int as it is, a float as a fraction of `total`, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * total - 1e-9)


def as_lists(value: Any) -> Any:
    return [as_lists(x) for x in value] if isinstance(value, tuple) else value


def check(name: str, value: Any, ok: bool, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: accepted: {accepted}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    check(name, value, value in choices, " or ".join(map(repr, choices)))


def check_fraction(name: str, value: Any) -> None:
    check(name, value, is_number(value) and 0 < value <= 1, "a fraction in (0, 1]")


def suggest(word: str, accepted: list[str]) -> str:
    close = difflib.get_close_matches(word, accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
