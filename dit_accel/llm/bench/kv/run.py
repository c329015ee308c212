"""`run_kv_bench`: quality benchmark of KV caches, with one table row per cache setting."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dit_accel.config import KVConfig
from dit_accel.config.base import as_lists, check, is_int
from dit_accel.environment import machine, versions
from dit_accel.llm.bench import retrieval
from dit_accel.llm.bench.kv import lookups, text_sessions
from dit_accel.llm.bench.kv.conversation import MODES, converse, own_cache
from dit_accel.llm.bench.kv.session import Session, read_sessions, tokenized
from dit_accel.llm.bench.kv.text_quality import RestPredictions, distance, predict_rest
from dit_accel.llm.bench.rows import run_rows
from dit_accel.llm.bench.texts import text_ids
from dit_accel.llm.bench.wired import wired_model
from dit_accel.llm.control import disable, enable
from dit_accel.llm.kvcache.cache import KVCache, zone_layers
from dit_accel.llm.loading import ModelSource

FORMAT_VERSION = 1
OWN = "transformers"
"""Name of the row of transformers' own cache, the reference of all other rows."""
MAX_TURNS = len(text_sessions.COLOURS)


@dataclass(frozen=True, kw_only=True)
class KVBenchSettings:
    """Texts, tasks and modes of the benchmark."""

    length: int = 4096
    """Number of tokens per text. The perplexity is that of the last quarter, with the first three quarters in the cache."""
    texts: tuple[str, ...] = ("prose", "code")
    """Names of texts: prose, code, or paths of text files. Empty: no perplexity."""
    tasks: tuple[str, ...] = ("passkey",)
    """Text tasks for the language model. Empty: only lookups."""
    sessions: Path | None = None
    """JSONL file in the format of SCBench, whose sessions are an additional task."""
    lookups: tuple[str, ...] = tuple(lookups.TASKS)
    """Tasks for the handwritten model. Empty: only the language model."""
    lookup_length: int = 6000
    """Number of tokens per context of the handwritten model."""
    modes: tuple[str, ...] = MODES
    """Modes of a session, see `MODES`."""
    count: int = 4
    """Number of sessions per task."""
    turns: int = 4
    """Number of questions per session."""
    new_tokens: int = 8
    """Smallest number of tokens to generate for an answer."""
    seed: int = 0
    """Random seed of the sessions."""

    def __post_init__(self) -> None:
        for name, least in (("length", 256), ("count", 1), ("new_tokens", 1)):
            value = getattr(self, name)
            check(name, value, is_int(value) and value >= least, f"an int >= {least}")
        turns, long = self.turns, self.lookup_length
        check(
            "turns", turns, is_int(turns) and 1 <= turns <= MAX_TURNS, f"an int in [1, {MAX_TURNS}]"
        )
        low, high = retrieval.MIN_LENGTH, 32_000
        check(
            "lookup_length",
            long,
            is_int(long) and low <= long <= high,
            f"an int in [{low}, {high}]",
        )
        for name, known in (
            ("tasks", text_sessions.TASKS),
            ("lookups", lookups.TASKS),
            ("modes", MODES),
        ):
            value = getattr(self, name)
            ok = len(set(value)) == len(value) and set(value) <= set(known)
            check(name, value, ok, f"different ones of {', '.join(known)}")
        check("texts", self.texts, len(set(self.texts)) == len(self.texts), "different texts")
        check("seed", self.seed, is_int(self.seed), "an int")


@dataclass(frozen=True)
class KVBench:
    """Prepared inputs of a benchmark run, and the header of its results."""

    settings: KVBenchSettings
    ids: dict[str, Any]
    """Token ids `[1, L]` of each text."""
    sessions: dict[str, list[Session]]
    """Sessions of each text task."""
    tokenizer: Any
    header: dict[str, Any]


def prepare_kv(
    source: ModelSource, settings: KVBenchSettings, *, dtype: str, device: str
) -> KVBench:
    """Read texts and make sessions without loading the model.

    Args:
        source: source of the model.
        settings: texts, tasks and modes.
        dtype, device: dtype and device of the model, for the results.

    Raises:
        ValueError: a file cannot be read, a text is too short, or a length is larger than the model supports.
    """
    if settings.texts:
        source.check_length("length", settings.length)
    ids, hashes = text_ids(source.tokenizer, settings.texts, settings.length)
    made: dict[str, list[Session]] = {}
    for task in settings.tasks:
        rng = random.Random(f"{task} {settings.length} {settings.seed}")
        made[task] = [
            _fitting(task, settings.length, settings.turns, rng, source.tokenizer)
            for _ in range(settings.count)
        ]
    if settings.sessions is not None:
        given = read_sessions(settings.sessions)
        made[settings.sessions.stem] = [tokenized(x, source.tokenizer) for x in given]
    for task, sessions in made.items():
        for session in sessions:
            source.check_length(f"sessions of {task}", session.length, settings.new_tokens)
    plain = {k: as_lists(x) for k, x in asdict(settings).items()}
    plain["sessions"] = None if settings.sessions is None else settings.sessions.name
    header = {
        "format_version": FORMAT_VERSION,
        "kind": "llm-bench-kv",
        "model": source.name,
        "revision": source.revision,
        "dtype": dtype,
        "device": device,
        "settings": plain,
        "texts": hashes,
        "versions": versions(),
        "machine": machine(),
    }
    return KVBench(settings, ids, made, source.tokenizer, header)


def run_kv_bench(
    model: Callable[[], Any],
    bench: KVBench,
    caches: Mapping[str, KVConfig],
    *,
    output: Path | None = None,
    rows: list[dict[str, Any]] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the benchmark for transformers' own cache and for each cache setting, and return the results with all rows.

    Args:
        model: function that loads the model; called only if a row is missing and there is a text or a text task.
        bench: prepared inputs, see `prepare_kv`.
        caches: settings by row name.
        output: JSON file, written after each row. Default: no file.
        rows: existing rows.
        on_row: called with each new row.
    """
    wanted: dict[str, KVConfig | None] = {OWN: None, **caches}
    before = 3 * bench.settings.length // 4

    @cache
    def prepared() -> tuple[Any, dict[str, RestPredictions], Any]:
        """Return the model, its predictions with transformers' own cache, and the handwritten model."""
        loaded = disable(model()) if bench.ids or bench.sessions else None
        exact = {
            x: predict_rest(loaded, ids, before, own_cache(loaded)) for x, ids in bench.ids.items()
        }
        return loaded, exact, wired_model() if bench.settings.lookups else None

    def measure_row(name: str) -> dict[str, Any]:
        loaded, exact, wired = prepared()
        return _measure_row(loaded, wired, bench, wanted[name], exact)

    plain = {name: None if x is None else x.to_dict() for name, x in wanted.items()}
    return run_rows(
        bench.header,
        "kv",
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
    bench: KVBench,
    config: KVConfig | None,
    exact: Mapping[str, RestPredictions],
) -> dict[str, Any]:
    """Return the measurements of one row."""
    settings, texts, tasks = bench.settings, {}, {}
    half = 3 * settings.length // 4
    if model is not None:
        with _enabled_cache(model, config) as new_cache:
            for name, ids in bench.ids.items():
                found = predict_rest(model, ids, half, new_cache())
                texts[name] = {
                    **distance(exact[name], found),
                    "cache_bytes": found.cache_bytes,
                    "bytes_share": found.cache_bytes / exact[name].cache_bytes,
                    "read_share": found.read_share,
                }
            for task, sessions in bench.sessions.items():
                tasks[task] = _task(model, settings, sessions, new_cache, bench.tokenizer.decode)
    if wired is not None and (config is None or _fits(wired, config)):
        with _enabled_cache(wired, config) as new_cache:
            for task in settings.lookups:
                rng = random.Random(f"{task} {settings.lookup_length} {settings.seed}")
                sessions = [
                    lookups.TASKS[task](settings.lookup_length, settings.turns, rng)
                    for _ in range(settings.count)
                ]
                tasks[f"lookup {task}"] = _task(wired, settings, sessions, new_cache, None)
    return {"texts": texts, "tasks": tasks}


def _task(
    model: Any,
    settings: KVBenchSettings,
    sessions: list[Session],
    new_cache: Callable[[], Any],
    decode: Callable[[list[int]], str] | None,
) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the results of each turn and session, by mode."""
    return {
        mode: [
            [
                turn.to_dict()
                for turn in converse(
                    model,
                    session,
                    mode,
                    new_cache=new_cache,
                    new_tokens=settings.new_tokens,
                    decode=decode,
                )
            ]
            for session in sessions
        ]
        for mode in settings.modes
    }


class _enabled_cache:
    """Context manager that enables a model with cache settings and returns a function that makes empty caches."""

    def __init__(self, model: Any, config: KVConfig | None) -> None:
        self.model, self.config = model, config

    def __enter__(self) -> Callable[[], Any]:
        model, config = self.model, self.config
        if config is None:
            return lambda: own_cache(model)
        enable(model, kv=config)
        return lambda: KVCache(model, config)

    def __exit__(self, *error: object) -> None:
        disable(self.model)


def _fits(wired: Any, config: KVConfig) -> bool:
    """Return whether cache settings fit the handwritten model. Files for another model do not."""
    try:
        zone_layers(wired.config, config)
    except ValueError:
        return False
    return True


def _fitting(task: str, length: int, turns: int, rng: random.Random, tokenizer: Any) -> Session:
    """Return a session of about `length` tokens, and not more."""
    state, size = rng.getstate(), 4 * length
    while True:
        rng.setstate(state)
        session = tokenized(text_sessions.TASKS[task](size, turns, rng), tokenizer)
        if session.length <= length:
            return session
        size = int(size * min(0.95, length / session.length * 0.98))
