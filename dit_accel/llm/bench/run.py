"""`run_bench`: one row for each pattern, kept in a results file that a later run goes on from."""

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
from dit_accel.llm.loading import Source
from dit_accel.llm.quality import Outputs, comparison, outputs
from dit_accel.llm.resume import read_same

FORMAT_VERSION = 2
DENSE = "dense"
"""Name of the row that the others are compared with."""
MIN_LENGTH = 256
MAX_RETRIEVAL = 32_768


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Texts and tasks of the table."""

    length: int = 4096
    """Tokens of each text, and of each prompt with a passkey."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose, code, or paths of text files; none: retrieval only."""
    passkeys: int = 8
    """Prompts with a passkey; 0: none."""
    retrieval_lengths: tuple[int, ...] = (4096,)
    """Tokens of a prompt of the hand-written model; each task is run at each length."""
    retrieval_prompts: int = 8
    """Prompts of each task and length; 0: none."""
    seed: int = 0

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
    """Texts and prompts of a run, and the header of its results."""

    settings: BenchSettings
    ids: dict[str, Any]
    """Tokens `[1, L]` of each text."""
    passkeys: list[Passkey]
    header: dict[str, Any]
    """Results without rows."""


def prepare(source: Source, settings: BenchSettings, *, dtype: str, device: str) -> Bench:
    """Read texts and make prompts; the model is not loaded.

    Args:
        source: the model.
        settings: texts and tasks.
        dtype, device: those of the model, for the results.

    Raises:
        ValueError: a text that cannot be read or is too short, or a length that the model does not accept.
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
    """Return the rows of a results file that a run may go on from; none if there is no file.

    Args:
        path: the file.
        header: what the results of the run will say; all but the machine must be equal.

    Raises:
        ValueError: the file is no such results file, or was made with other settings or versions.
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
    """Return the results of dense attention, of each pattern, and of rows that exist.

    Patterns are sparse at all lengths here, whatever their `crossover`.

    Args:
        model: loads the model; called if a row is missing and there is a text or a passkey.
        bench: see `prepare`.
        patterns: settings by the name of their row.
        output: JSON file, written after each row. Default: none.
        rows: rows that exist, see `read_rows`.
        on_row: called with each row that is new.
    """
    wanted: dict[str, PrefillConfig | None] = {DENSE: None}
    for name, settings in patterns.items():
        wanted[name] = PrefillConfig.from_dict({**vars(settings), "crossover": 0})
    reads = bool(bench.ids or bench.passkeys)

    @cache
    def prepared() -> tuple[Any, dict[str, Outputs], Any]:
        """Return the model, what it predicts with dense attention, and the hand-written model."""
        loaded = disable(model()) if reads else None
        references = {x: outputs(loaded, ids) for x, ids in bench.ids.items()}
        return loaded, references, wired_model() if bench.settings.retrieval_prompts else None

    def figures(name: str) -> dict[str, Any]:
        loaded, references, wired = prepared()
        return _figures(loaded, wired, bench, wanted[name], references)

    plain = {name: None if x is None else x.to_dict() for name, x in wanted.items()}
    return run_rows(
        bench.header,
        "prefill",
        plain,
        figures,
        prepare=prepared,
        output=output,
        rows=rows,
        on_row=on_row,
    )


def _figures(
    model: Any,
    wired: Any,
    bench: Bench,
    config: PrefillConfig | None,
    references: Mapping[str, Outputs],
) -> dict[str, Any]:
    """Return the figures of one row."""
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
