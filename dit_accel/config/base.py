"""`Config`: loading, saving and checking of settings, shared by the sections of a YAML file."""

import dataclasses
import difflib
import math
import os
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

SECTIONS = ("ras", "sla")


class Config:
    """Loading and saving, shared by the configs. Each is one section of a YAML file."""

    SECTION: ClassVar[str]
    PRESETS: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def load(cls, source: Any) -> Any:
        """From a config, a dict, a preset name or a YAML file."""
        if isinstance(source, cls):
            return source
        if isinstance(source, dict):
            return cls.from_dict(source)
        if isinstance(source, str) and source in cls.PRESETS:
            return cls(**cls.PRESETS[source])
        if isinstance(source, str | os.PathLike):
            if Path(source).is_file():
                return cls.from_yaml(source)
            names = list(cls.PRESETS)
            raise ValueError(
                f"{cls.SECTION}={str(source)!r}: no such preset or YAML file{suggest(str(source), names)}; "
                f"accepted are {', '.join(names)}, a YAML file, an {cls.__name__} or a dict"
            )
        raise ValueError(
            f"{cls.SECTION}={source!r}: accepted are a preset name, a YAML file, an {cls.__name__} or a dict"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """From field names and values; an unknown key is an error with a suggestion."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r}{suggest(str(key), names)}; accepted are {', '.join(names)}"
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> Any:
        """From the section of a YAML file (`sla:` or `ras:`) that has these very field names."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: not a readable YAML file ({error})") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path}: accepted is a mapping with the section {cls.SECTION}:")
        for key in data:
            if key not in SECTIONS:
                raise ValueError(
                    f"{path}: unknown section {key!r}{suggest(str(key), list(SECTIONS))}; accepted are ras: and sla:"
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
        """Plain values, ready for JSON or YAML; `from_dict` reads them back."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {key: as_lists(x) for key, x in values.items()}


def num_steps_of(value: int | float, num_steps: int) -> int:
    """A number of steps: an int is one, a float a fraction of `num_steps`, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * num_steps - 1e-9)


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
