"""The types of results.json, format version 1, and its words."""

from typing import Any, NotRequired, TypedDict

FORMAT_VERSION = 1
RESULTS = "results.json"
METHODS = ("dense", "fewer_steps", "cache", "ras", "sla", "ras_sla")
"""The first two are the reference and what any acceleration has to beat."""
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
"""What a browser shows, by suffix."""


class Extractor(TypedDict):
    """The network behind a figure."""

    id: str
    sha256: str
    resize: NotRequired[str | None]


class Figure(TypedDict):
    """One number and what it rests on."""

    value: float | None
    """None with `why`; for PSNR also where all of the `n` pairs are identical (`infinite == n`)."""
    n: int
    interval_95: list[float] | None
    unit: str
    extractor: Extractor | None
    why: NotRequired[str]
    infinite: NotRequired[int]
    """Identical pairs; they are in `n` but not in `value`."""
    flags: NotRequired[list[str]]
    """What limits the figure, in a word."""
    of: NotRequired[str]
    """What `n` counts, if not samples: "frames"."""
    n_reference: NotRequired[int]
    """Size of the set it was compared with."""
    truncated: NotRequired[int]
    """Prompts that CLIP could not read to their end."""
    values: NotRequired[dict[str, float | None]]
    """By sample id, of metrics that give each sample a value; None for an identical pair."""


class Phase(TypedDict):
    """Seconds of one phase of a call over `n` measured runs."""

    median: float
    iqr: list[float]
    """First and third quartile."""
    n: int


class Row(TypedDict):
    """One way to sample."""

    name: str
    method: str
    available: bool
    why: str | None
    """Why not, if it is not available."""
    settings: dict[str, Any]
    num_inference_steps: int
    metrics: dict[str, Figure]
    seconds: dict[str, Phase]
    speedup: dict[str, float] | None
    peak_memory_bytes: int | None
    peak_memory_of: str | None
    """"gpu" or "process"."""
    density: float | None
    """Attended share of all (query, key) pairs over every self-attention call."""
    cost: float | None
    """Steps of a dense run that would cost as much, by counted FLOPs."""
    folder: str | None
    """Of its sample set, relative to results.json."""


class Sample(TypedDict):
    """What each row made of one prompt."""

    id: str
    prompt: str
    media: dict[str, str]
    """By row name: a picture or an mp4, relative to results.json."""


class Results(TypedDict):
    """The whole file."""

    format_version: int
    kind: str
    title: str
    model: str
    sampling: dict[str, Any]
    prompts: int
    reference: str
    """Name of the row that the others are compared with, or its method."""
    fine: NotRequired[dict[str, Any] | None]
    """`num_inference_steps` and `folder` of the fine run that metrics ending in "_fine" compare with."""
    versions: dict[str, Any]
    machine: dict[str, Any]
    repeats: int
    rows: list[Row]
    samples: list[Sample]


def reference_row(results: Results) -> Row:
    """The row that the others are compared with."""
    named = [row for row in results["rows"] if row["name"] == results["reference"]]
    return (named or [row for row in results["rows"] if row["method"] == results["reference"]])[0]


def identical(figure: Figure) -> bool:
    """Whether all pairs of this figure are the same to the last bit: infinite PSNR."""
    return figure["value"] is None and 0 < figure["n"] == figure.get("infinite", 0)
