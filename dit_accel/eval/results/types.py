"""Types of results.json, format version 1.

A field's type says what the file may hold. `store.validate` checks a file against these types.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

FORMAT_VERSION = 1
RESULTS = "results.json"
METHODS = ("dense", "fewer_steps", "cache", "ras", "sla", "ras_sla")
"""The first two are the reference and the free baseline; the others accelerate."""
ACCELERATED = METHODS[2:]
PHASES = ("text", "denoise", "decode", "total")
SPEEDUPS = ("denoise", "total")
MEDIA = {
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
"""MIME types of the files that a browser shows, by suffix."""


class Rule(NamedTuple):
    """Condition on a field's value, next to its type."""

    accepted: str
    """Valid values, for the error message."""
    holds: Callable[[Any], bool]


def finite(value: Any) -> bool:
    """Return whether `value` is a number other than NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_of(names: Sequence[str]) -> Rule:
    """Return the rule that a text is one of `names`."""
    return Rule(f"one of {', '.join(names)}", lambda x: x in names)


def _at_least(least: int) -> Rule:
    return Rule(f"a whole number >= {least}", lambda x: type(x) is int and x >= least)


def _in_range(accepted: str, highest: float) -> Rule:
    return Rule(f"a finite number {accepted}", lambda x: finite(x) and 0 <= x <= highest)


def _ordered(pair: Any) -> bool:
    return len(pair) == 2 and all(map(finite, pair)) and pair[0] <= pair[1]


def _inside(path: str) -> bool:
    """Return whether a path stays inside its folder, so that a page cannot embed other files."""
    parts = PurePosixPath(path)
    outside = parts.is_absolute() or ".." in parts.parts or bool(PureWindowsPath(path).drive)
    return path not in ("", ".") and "\\" not in path and "\0" not in path and not outside


def _shown(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in MEDIA


Text = Annotated[str, Rule("a text that is not empty", lambda x: x.strip() != "")]
Count = Annotated[int, _at_least(0)]
PositiveCount = Annotated[int, _at_least(1)]
NonNegative = Annotated[float, _in_range(">= 0", math.inf)]
Share = Annotated[float, _in_range(">= 0 and <= 1", 1.0)]
Interval = Annotated[list[float], Rule("[lower, upper], finite and in order", _ordered)]
FolderPath = Annotated[str, Rule("a path inside the folder, with forward slashes", _inside)]
MediaPath = Annotated[FolderPath, Rule(f"a path that ends in {', '.join(MEDIA)}", _shown)]
PLAIN = {
    bool: (Rule("true or false", lambda x: isinstance(x, bool)),),
    float: (Rule("a finite number", finite),),
    str: (
        Rule("a text", lambda x: isinstance(x, str)),
        Rule(
            "a text without lone surrogates, which UTF-8 cannot write",
            lambda x: x.encode("utf-8", errors="replace").decode() == x,
        ),
    ),
}
"""Rules of the types that have no rules next to them."""


class Extractor(TypedDict):
    """Network behind a metric's value."""

    id: Text
    sha256: Text
    resize: NotRequired[str | None]


class MetricValue(TypedDict):
    """Value of one metric, with its sample size, interval and network."""

    value: float | None
    """None with the reason in `why`; also None for a PSNR whose `n` pairs are all identical."""
    n: Count
    interval_95: Interval | None
    unit: str
    extractor: Extractor | None
    why: NotRequired[Text]
    infinite: NotRequired[Count]
    """Number of identical pairs: counted in `n`, left out of `value`."""
    flags: NotRequired[list[str]]
    """Limits of the value, such as "rank-deficient"."""
    of: NotRequired[Text]
    """Unit of `n` where it does not count samples: "frames"."""
    n_reference: NotRequired[Count]
    """Size of the set that the samples are compared with."""
    truncated: NotRequired[Count]
    """Number of prompts that are longer than CLIP's limit."""
    values: NotRequired[dict[str, float | None]]
    """Values by sample id, for metrics of single samples; None for an identical pair."""


class Phase(TypedDict):
    """Seconds of one phase of a call over `n` measured runs."""

    median: NonNegative
    iqr: Interval
    """First and third quartile."""
    n: PositiveCount


class Row(TypedDict):
    """Settings and measurements of one sampling method."""

    name: Text
    method: Annotated[str, one_of(METHODS)]
    available: bool
    why: Text | None
    """Reason, if the method is not available."""
    settings: dict[str, Any]
    num_inference_steps: Count
    metrics: dict[str, MetricValue]
    seconds: dict[str, Phase]
    speedup: dict[str, NonNegative] | None
    peak_memory_bytes: Count | None
    peak_memory_of: str | None
    """"gpu" or "process"."""
    density: Share | None
    """Attended share of all (query, key) pairs over every self-attention call."""
    cost: NonNegative | None
    """Steps of a dense run with the same number of counted FLOPs."""
    folder: FolderPath | None
    """Folder of the row's sample set, relative to results.json."""


class Sample(TypedDict):
    """Files that the rows made from one prompt."""

    id: Text
    prompt: str
    media: dict[str, MediaPath]
    """Picture or mp4 by row name, relative to results.json."""


class Fine(TypedDict):
    """Fine run that metrics ending in "_fine" compare with."""

    num_inference_steps: PositiveCount
    folder: FolderPath


class Results(TypedDict):
    """Content of results.json."""

    format_version: int
    kind: str
    title: Text
    model: Text
    sampling: dict[str, Any]
    prompts: PositiveCount
    reference: Text
    """Name or method of the row that the others are compared with."""
    fine: NotRequired[Fine | None]
    versions: dict[str, Any]
    machine: dict[str, Any]
    repeats: PositiveCount
    rows: list[Row]
    samples: list[Sample]


def reference_row(results: Results) -> Row:
    """Return the row that the others are compared with."""
    named = [row for row in results["rows"] if row["name"] == results["reference"]]
    return (named or [row for row in results["rows"] if row["method"] == results["reference"]])[0]


def identical(value: MetricValue) -> bool:
    """Return whether all pairs behind this value are identical, which makes PSNR infinite."""
    return value["value"] is None and 0 < value["n"] == value.get("infinite", 0)
