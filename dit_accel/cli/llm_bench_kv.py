"""`dit-accel llm bench-kv`."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from dit_accel.cli.llm_options import LanguageModelOptions
from dit_accel.cli.options import check_output
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Tasks:
    """Texts, tasks and modes of the table."""

    length: int = 4096
    """Tokens of a text, whose last quarter is read with the rest in the cache, and of a session in words at most."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (documentation of this Python), code (modules of its library), or text files in UTF-8; none: no perplexity."""
    tasks: tuple[
        Literal[
            "passkey", "key_value", "prefix_suffix", "variable_tracing", "math_find", "many_shot"
        ],
        ...,
    ] = ("passkey",)
    """Tasks in words for the language model. Small models find little but passkeys."""
    sessions: Path | None = None
    """JSONL file in the form of SCBench (context, multi_turns with input and answer): one more task."""
    lookups: tuple[Literal["key_value", "variable_tracing"], ...] = (
        "key_value",
        "variable_tracing",
    )
    """Tasks of the model with hand-written weights; none: only the language model."""
    lookup_length: int = 6000
    """Tokens of their contexts, at most 32000."""
    modes: tuple[Literal["single", "multi_turn", "multi_request"], ...] = (
        "single",
        "multi_turn",
        "multi_request",
    )
    """single: each question with the context, on a cache of its own; multi_turn: a conversation; multi_request: the context
    once, each question on a fork of the cache."""
    count: int = 4
    """Sessions of each task."""
    turns: int = 4
    """Questions of a session, at most 16."""
    new_tokens: int = 8
    """Tokens that are generated for an answer, at least."""
    seed: int = 0


@dataclass(kw_only=True)
class BenchKV(LanguageModelOptions):
    """Caches of keys and values in one table: perplexity of a text that is read on, right answers over whole
    conversations, times, bytes and the share of the tokens that is read. Started again after a kill, it goes on."""

    caches: tuple[str, ...] = ()
    """Rows beside transformers' own cache: names of presets, or YAML files with the section kv:. Default: all presets that
    fit the model."""
    tasks: OmitArgPrefixes[Tasks] = field(default_factory=Tasks)
    output: Path = Path("outputs/llm-bench-kv.json")
    """Results file, written after each row; a picture of the same name (.png) beside it where matplotlib is installed."""
    overwrite: bool = False
    """Replace results that were made with other settings."""

    def run(self) -> None:
        from dit_accel.llm.bench.kv.picture import draw
        from dit_accel.llm.bench.kv.run import KVBenchSettings, prepare, run_bench
        from dit_accel.llm.bench.kv.table import table_lines
        from dit_accel.llm.kvcache.cache import zone_layers
        from dit_accel.llm.resume import read_same

        if self.output.is_dir():
            raise ValueError(
                f"output={str(self.output)!r}: is a folder; accepted is the name of a file"
            )
        settings = KVBenchSettings(**{**asdict(self.tasks), "sessions": self.tasks.sessions})
        rows = self._rows()
        place = self.place()
        source = self.source()
        left: list[str] = []
        for name, config in list(rows.items()):
            try:
                zone_layers(source.config, config)
            except ValueError as error:
                if self.caches:
                    raise
                left.append(f"{name}: left out ({error})\n")
                del rows[name]
        bench = prepare(
            source,
            settings,
            dtype=str(place["dtype"]).removeprefix("torch."),
            device=place["device"].type,
        )
        kept = []
        if self.output.exists() and not self.overwrite:
            kept = read_same(self.output, bench.header, "result of llm bench-kv")["rows"]
        check_output(self.output.parent, "output")
        sys.stderr.writelines(left)
        results = run_bench(
            lambda: source.load(**place),
            bench,
            rows,
            output=self.output,
            rows=kept,
            on_row=_show,
        )
        draw(results, self.output.with_suffix(".png"))
        if self.format == "json":
            print_json(results)
            return
        print_line("\n".join(table_lines(results)))

    def _rows(self) -> dict[str, Any]:
        from dit_accel.config import KVConfig
        from dit_accel.llm.kvcache.cache import read_kv

        found: dict[str, Any] = {}
        for name in self.caches or KVConfig.PRESETS:
            row = Path(name).stem if Path(name).is_file() else name
            if row in found:
                raise ValueError(f"caches: {name!r} is there twice; accepted are different names")
            found[row] = read_kv(name)
        return found


def _show(row: dict[str, Any]) -> None:
    sys.stderr.write(f"{row['name']}: {row['seconds']:.0f} s\n")
