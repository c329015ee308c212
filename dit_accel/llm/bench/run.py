"""`run_bench`: quality benchmark of prefill patterns, with one table row per pattern."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dit_accel.config import PrefillConfig
from dit_accel.config.base import as_lists, check, is_int
from dit_accel.environment import machine, versions
from dit_accel.llm.bench import retrieval
from dit_accel.llm.bench.lookup import retrieval_row
from dit_accel.llm.bench.passkey import Passkey, make_passkeys, score_passkeys
from dit_accel.llm.bench.rows import run_rows
from dit_accel.llm.bench.texts import text_ids
from dit_accel.llm.bench.wired import wired_model
from dit_accel.llm.control import disable, enable, summary
from dit_accel.llm.loading import ModelSource
from dit_accel.llm.quality import Outputs, comparison, outputs
from dit_accel.llm.resume import read_same

FORMAT_VERSION = 2
DENSE = "dense"
"""Name of the row of dense attention, the reference of all other rows."""
MIN_LENGTH = 256
MAX_RETRIEVAL = 32_768


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Texts and tasks of the benchmark."""

    length: int = 4096
    """Number of tokens of each text and of each passkey prompt."""
    texts: tuple[str, ...] = ("prose", "code")
    """Names of texts: prose, code, or paths of text files. Empty: no perplexity."""
    passkeys: int = 8
    """Number of passkey prompts; 0: none."""
    retrieval_lengths: tuple[int, ...] = (4096,)
    """Prompt lengths of the retrieval tasks on the handwritten model. Each task is run at each length."""
    retrieval_prompts: int = 8
    """Number of prompts per retrieval task and length; 0: none."""
    seed: int = 0
    """Random seed of the prompts."""

    def __post_init__(self) -> None:
        check("length", self.length, is_int(self.length) and self.length >= MIN_LENGTH, f"an int >= {MIN_LENGTH}")  # fmt: skip
        check("texts", self.texts, len(set(self.texts)) == len(self.texts), "different texts")  # fmt: skip
        for name in ("passkeys", "retrieval_prompts"):
            value = getattr(self, name)
            check(name, value, is_int(value) and value >= 0, "an int >= 0")
        low, lengths = retrieval.MIN_LENGTH, self.retrieval_lengths
        ok = all(is_int(x) and low <= x <= MAX_RETRIEVAL for x in lengths)
        ok = ok and len(set(lengths)) == len(lengths) > 0
        check("retrieval_lengths", lengths, ok, f"different ints in [{low}, {MAX_RETRIEVAL}]")
        check("seed", self.seed, is_int(self.seed), "an int")


@dataclass(frozen=True)
class Bench:
    """Prepared inputs of a benchmark run, and the header of its results."""

    settings: BenchSettings
    ids: dict[str, Any]
    """Token ids `[1, L]` of each text."""
    passkeys: list[Passkey]
    header: dict[str, Any]
    """Results without rows."""


def prepare(source: ModelSource, settings: BenchSettings, *, dtype: str, device: str) -> Bench:
    """Read texts and make prompts without loading the model.

    Args:
        source: source of the model.
        settings: texts and tasks.
        dtype, device: dtype and device of the model, for the results.

    Raises:
        ValueError: a text cannot be read or is too short, or the length is larger than the model supports.
    """
    if settings.texts or settings.passkeys:
        source.check_length("length", settings.length)
    ids, hashes = text_ids(source.tokenizer, settings.texts, settings.length)
    passkeys = make_passkeys(source.tokenizer, settings.length, settings.passkeys, settings.seed)
    header = {
        "format_version": FORMAT_VERSION,
        "kind": "llm-bench",
        "model": source.name,
        "revision": source.revision,
        "dtype": dtype,
        "device": device,
        "settings": {k: as_lists(x) for k, x in asdict(settings).items()},
        "texts": hashes,
        "versions": versions(),
        "machine": machine(),
    }
    return Bench(settings, ids, passkeys, header)


def read_rows(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an existing results file; an empty list if there is no file.

    Args:
        path: path of the results file.
        header: header of the current run; all except the machine must equal that of the file.

    Raises:
        ValueError: the file is not a results file, or was made with other settings or versions.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = read_same(path, header, "result of llm bench")["rows"]
    return rows


def run_bench(
    model: Callable[[], Any],
    bench: Bench,
    patterns: Mapping[str, PrefillConfig],
    *,
    output: Path | None = None,
    rows: list[dict[str, Any]] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the benchmark for dense attention and for each pattern, and return the results with all rows.

    `crossover` of the settings is replaced by 0, so that patterns are sparse at every length.

    Args:
        model: function that loads the model; called only if a row is missing and there is a text or a passkey.
        bench: prepared inputs, see `prepare`.
        patterns: settings by row name.
        output: JSON file, written after each row. Default: no file.
        rows: existing rows, see `read_rows`.
        on_row: called with each new row.
    """
    wanted: dict[str, PrefillConfig | None] = {DENSE: None}
    for name, settings in patterns.items():
        wanted[name] = PrefillConfig.from_dict({**vars(settings), "crossover": 0})
    reads = bool(bench.ids or bench.passkeys)

    @cache
    def prepared() -> tuple[Any, dict[str, Outputs], Any]:
        """Return the model, its predictions with dense attention, and the handwritten model."""
        loaded = disable(model()) if reads else None
        references = {x: outputs(loaded, ids) for x, ids in bench.ids.items()}
        return loaded, references, wired_model() if bench.settings.retrieval_prompts else None

    def measure_row(name: str) -> dict[str, Any]:
        loaded, references, wired = prepared()
        return _measure_row(loaded, wired, bench, wanted[name], references)

    plain = {name: None if x is None else x.to_dict() for name, x in wanted.items()}
    return run_rows(
        bench.header,
        "prefill",
        plain,
        measure_row,
        prepare=prepared,
        output=output,
        rows=rows,
        on_row=on_row,
    )


def _measure_row(
    model: Any,
    wired: Any,
    bench: Bench,
    config: PrefillConfig | None,
    references: Mapping[str, Outputs],
) -> dict[str, Any]:
    """Return the measurements of one row."""
    texts: dict[str, Any] = {}
    densities = []
    try:
        for name, ids in bench.ids.items():
            if config is None:
                texts[name] = {"perplexity": references[name].perplexity}
                continue
            enable(model, prefill=config)
            found = comparison(references[name], outputs(model, ids), summary(model), ids.shape[1])
            texts[name] = asdict(found)
            densities.append(found.density)
        passkeys = asdict(score_passkeys(model, bench.passkeys)) if bench.passkeys else None
    finally:
        if model is not None:
            disable(model)
    settings = bench.settings
    density = sum(densities) / len(densities) if densities else None
    return {
        "density": 1.0 if config is None else density,
        "texts": texts,
        "passkeys": passkeys,
        "retrieval": None
        if wired is None
        else retrieval_row(
            wired,
            config,
            settings.retrieval_lengths,
            prompts=settings.retrieval_prompts,
            seed=settings.seed,
        ),
    }
