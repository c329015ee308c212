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
    """Texts, tasks and modes of the benchmark."""

    length: int = 4096
    """Number of tokens per text, and maximum number of tokens per session. The perplexity is that of the last quarter of a
    text, with the first three quarters in the cache."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (Python documentation), code (source of the Python library), or UTF-8 text files. Empty: no perplexity."""
    tasks: tuple[
        Literal[
            "passkey", "key_value", "prefix_suffix", "variable_tracing", "math_find", "many_shot"
        ],
        ...,
    ] = ("passkey",)
    """Text tasks for the language model. Small models solve hardly any task except passkey."""
    sessions: Path | None = None
    """JSONL file in the format of SCBench (context, multi_turns with input and answer), used as an additional task."""
    lookups: tuple[Literal["key_value", "variable_tracing"], ...] = (
        "key_value",
        "variable_tracing",
    )
    """Tasks for the model with handwritten weights. Empty: only the language model."""
    lookup_length: int = 6000
    """Number of tokens per context of these tasks, at most 32000."""
    modes: tuple[Literal["single", "multi_turn", "multi_request"], ...] = (
        "single",
        "multi_turn",
        "multi_request",
    )
    """single: each question together with the context, on a new cache; multi_turn: one conversation on one cache;
    multi_request: the context once, then each question on a fork of the cache."""
    count: int = 4
    """Number of sessions per task."""
    turns: int = 4
    """Number of questions per session, at most 16."""
    new_tokens: int = 8
    """Smallest number of tokens to generate for an answer."""
    seed: int = 0
    """Random seed of the sessions."""


@dataclass(kw_only=True)
class BenchKV(LanguageModelOptions):
    """Print a table of the quality and cost of KV caches: perplexity, right answers over whole conversations, times, bytes,
    and the share of tokens read. An interrupted run resumes from its results file."""

    caches: tuple[str, ...] = ()
    """Table rows beside transformers' own cache: names of presets, or YAML files with the section kv:. Default: all presets
    that fit the model."""
    tasks: OmitArgPrefixes[Tasks] = field(default_factory=Tasks)
    output: Path = Path("outputs/llm-bench-kv.json")
    """Results file, written after each row. If matplotlib is installed, a plot is written beside it (.png)."""
    overwrite: bool = False
    """Replace a results file that was made with other settings."""

    def run(self) -> None:
        from dit_accel.llm.bench.kv.picture import draw
        from dit_accel.llm.bench.kv.run import KVBenchSettings, prepare_kv, run_kv_bench
        from dit_accel.llm.bench.kv.table import table_lines
        from dit_accel.llm.kvcache.cache import zone_layers
        from dit_accel.llm.resume import read_same

        if self.output.is_dir():
            raise ValueError(
                f"output={str(self.output)!r}: is a folder; must be the name of a file"
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
        bench = prepare_kv(
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
        results = run_kv_bench(
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
                raise ValueError(f"caches: {name!r} is given twice; must be different names")
            found[row] = read_kv(name)
        return found


def _show(row: dict[str, Any]) -> None:
    sys.stderr.write(f"{row['name']}: {row['seconds']:.0f} s\n")
