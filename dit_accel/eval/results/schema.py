"""Checks of results.json: each error names the place in the file, the value and what is accepted."""

import math
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, cast

from dit_accel.eval.results.types import (
    FORMAT_VERSION,
    MEDIA,
    METHODS,
    PHASES,
    SPEEDUPS,
    Figure,
    Results,
    identical,
)


def validate(data: Any) -> Results:
    """Check everything that readers rely on; unknown keys are let through.

    Returns:
        `data` itself.

    Raises:
        ValueError: naming the place, as in `rows[2].metrics.psnr.n=-1`, and what is accepted.
    """
    _require(isinstance(data, dict), "results", data, "an object")
    _require(
        data.get("format_version") == FORMAT_VERSION,
        "format_version",
        data.get("format_version"),
        f"{FORMAT_VERSION}; another version of dit-accel wrote this file",
    )
    _require(data.get("kind") == "eval", "kind", data.get("kind"), '"eval"')
    top = _Place("", data)
    for key in ("title", "model", "reference"):
        top.text(key)
    for key in ("sampling", "versions", "machine"):
        top.mapping(key)
    top.count("prompts", 1)
    top.count("repeats", 1)
    if data.get("fine") is not None:
        fine = top.mapping("fine")
        fine.count("num_inference_steps", 1)
        fine.path("folder")
    rows, samples = top.sequence("rows"), top.sequence("samples")
    _require(len(rows) > 0, "rows", data["rows"], "at least one row")
    for row in rows:
        _check_row(row)
    names = _unique(rows, "name")
    _require(
        data["reference"] in names or any(r.data["method"] == data["reference"] for r in rows),
        "reference",
        data["reference"],
        f"the name or the method of a row; the names are {', '.join(map(repr, names))}",
    )
    for sample in samples:
        sample.text("id")
        sample.text("prompt", empty=True)
        media = sample.mapping("media")
        for name in media.data:
            _require(
                name in names,
                f"{media.name}: row",
                name,
                f"one of {', '.join(map(repr, names))}",
            )
            media.path(name, tuple(MEDIA))
    _unique(samples, "id")
    return cast(Results, data)


def _check_row(row: "_Place") -> None:
    row.text("name")
    row.choice("method", METHODS)
    row.flag("available")
    row.text("why", optional=row.data["available"])
    row.mapping("settings")
    row.count("num_inference_steps", 0)
    metrics, seconds = row.mapping("metrics"), row.mapping("seconds")
    for key in metrics.data:
        _check_figure(metrics.mapping(key))
    for key in seconds.data:
        _require(key in PHASES, f"{seconds.name}: phase", key, f"one of {', '.join(PHASES)}")
        phase = seconds.mapping(key)
        phase.number("median", lowest=0.0)
        phase.pair("iqr")
        phase.count("n", 1)
    if row.get("speedup") is not None:
        for key in SPEEDUPS:
            row.mapping("speedup").number(key, lowest=0.0)
    if row.get("peak_memory_bytes") is not None:
        row.count("peak_memory_bytes", 0)
        row.choice("peak_memory_of", ("gpu", "process"))
    row.number("density", lowest=0.0, highest=1.0, optional=True)
    row.number("cost", lowest=0.0, optional=True)
    if row.get("folder") is not None:
        row.path("folder")


def _check_figure(figure: "_Place") -> None:
    figure.number("value", optional=True)
    figure.count("n", 0)
    figure.text("unit", empty=True)
    if figure.get("interval_95") is not None:
        figure.pair("interval_95")
    if figure.get("extractor") is not None:
        extractor = figure.mapping("extractor")
        extractor.text("id")
        extractor.text("sha256")
    if "flags" in figure.data:
        flags = figure.data["flags"]
        ok = isinstance(flags, list) and all(isinstance(x, str) for x in flags)
        figure.check("flags", ok, "a list of texts")
    for key in ("n_reference", "truncated"):
        if key in figure.data:
            figure.count(key, 0)
    if "of" in figure.data:
        figure.text("of")
    if "values" in figure.data:
        values = figure.mapping("values")
        for key in values.data:
            values.number(key, optional=True)
    if "infinite" in figure.data:
        figure.count("infinite", 0)
    if figure.data["value"] is None and not identical(cast(Figure, figure.data)):
        figure.text("why")


class _Place:
    """An object inside the file, with the name it has in messages."""

    def __init__(self, name: str, data: Any) -> None:
        self.name, self.data = name, data

    def at(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def get(self, key: str) -> Any:
        if key not in self.data:
            raise ValueError(f"{self.at(key)} is missing")
        return self.data[key]

    def check(self, key: str, ok: bool, accepted: str) -> None:
        _require(ok, self.at(key), self.data[key], accepted)

    def text(self, key: str, *, empty: bool = False, optional: bool = False) -> None:
        value = self.get(key)
        ok = isinstance(value, str) and (empty or value.strip() != "")
        kind = "a text" if empty else "a text that is not empty"
        if ok and value.encode("utf-8", errors="replace").decode() != value:
            ok, kind = False, "a text without lone surrogates, which UTF-8 cannot write"
        self.check(key, ok or (optional and value is None), kind + (" or null" if optional else ""))

    def choice(self, key: str, choices: tuple[str, ...]) -> None:
        self.check(key, self.get(key) in choices, f"one of {', '.join(choices)}")

    def flag(self, key: str) -> None:
        self.check(key, isinstance(self.get(key), bool), "true or false")

    def count(self, key: str, lowest: int) -> None:
        value = self.get(key)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
        self.check(key, ok, f"a whole number >= {lowest}")

    def number(
        self,
        key: str,
        *,
        lowest: float = -math.inf,
        highest: float = math.inf,
        optional: bool = False,
    ) -> None:
        value = self.get(key)
        ok = (optional and value is None) or (_finite(value) and lowest <= value <= highest)
        bounds = f" >= {lowest:g}" if math.isfinite(lowest) else ""
        bounds += f" and <= {highest:g}" if math.isfinite(highest) else ""
        self.check(key, ok, f"a finite number{bounds}" + (" or null" if optional else ""))

    def pair(self, key: str) -> None:
        value = self.get(key)
        ok = isinstance(value, list) and len(value) == 2 and all(map(_finite, value))
        self.check(key, ok and value[0] <= value[1], "[lower, upper], finite and in order")

    def mapping(self, key: str) -> "_Place":
        value = self.get(key)
        self.check(key, isinstance(value, dict), "an object")
        return _Place(self.at(key), value)

    def sequence(self, key: str) -> list["_Place"]:
        """The objects of a list."""
        value = self.get(key)
        self.check(key, isinstance(value, list), "a list of objects")
        places = [_Place(f"{self.at(key)}[{i}]", entry) for i, entry in enumerate(value)]
        for place in places:
            _require(isinstance(place.data, dict), place.name, place.data, "an object")
        return places

    def path(self, key: str, suffixes: tuple[str, ...] = ()) -> None:
        """A path that stays inside the folder of the file: a page must not carry off other files."""
        value = self.get(key)
        ok = isinstance(value, str) and value not in ("", ".") and "\\" not in value
        if ok:
            parts = PurePosixPath(value)
            ok = not parts.is_absolute() and ".." not in parts.parts and "\0" not in value
            ok = ok and not PureWindowsPath(value).drive
            ok = ok and (not suffixes or parts.suffix.lower() in suffixes)
        kinds = f", ending in {', '.join(suffixes)}" if suffixes else ""
        self.check(key, ok, f"a path inside the folder, with forward slashes{kinds}")


def _require(ok: bool, place: str, value: Any, accepted: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(f"{place}={shown}: accepted is {accepted}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unique(places: list[_Place], key: str) -> list[str]:
    seen: list[str] = []
    for place in places:
        _require(place.data[key] not in seen, place.at(key), place.data[key], "a name used once")
        seen.append(place.data[key])
    return seen
