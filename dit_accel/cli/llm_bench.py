"""`dit-accel llm bench`."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes

from dit_accel.cli.llm_options import LanguageModelOptions
from dit_accel.cli.options import check_output
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Tasks:
    """Texts and tasks of the table."""

    length: int = 4096
    """Tokens of each text, and of each prompt with a passkey."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (documentation of this Python), code (modules of its library), or text files in UTF-8. Without any, and with
    --passkeys 0, the language model is not loaded and only retrieval is measured."""
    passkeys: int = 8
    """Prompts with a passkey; 0: none."""
    retrieval_lengths: tuple[int, ...] = (4096,)
    """Tokens of a prompt of the hand-written retrieval model, at most 32768."""
    retrieval_prompts: int = 8
    """Prompts of each of its tasks at each length; 0: none."""
    seed: int = 0


@dataclass(kw_only=True)
class Bench(LanguageModelOptions):
    """Quality of prefill patterns in one table: perplexity, KL of the last 128 positions and top-1 on real texts,
    passkeys, and retrieval on a model with hand-written weights. Started again after a kill, it goes on."""

    patterns: tuple[str, ...] = ()
    """Rows beside dense: names of patterns or presets, YAML files, or JSON files of llm search. Default: all patterns with their own options."""
    tasks: OmitArgPrefixes[Tasks] = field(default_factory=Tasks)
    output: Path = Path("outputs/llm-bench.json")
    """Results file, written after each row."""
    overwrite: bool = False
    """Replace results that were made with other settings."""

    def run(self) -> None:
        from dit_accel.llm.bench.run import BenchSettings, prepare, read_rows, run_bench
        from dit_accel.llm.bench.table import table_lines

        if self.output.is_dir():
            raise ValueError(
                f"output={str(self.output)!r}: is a folder; accepted is the name of a file"
            )
        settings = BenchSettings(**asdict(self.tasks))
        rows = self._rows()
        place = self.place()
        source = self.source()
        for config in rows.values():
            source.check_prefill(config)
        bench = prepare(
            source,
            settings,
            dtype=str(place["dtype"]).removeprefix("torch."),
            device=place["device"].type,
        )
        kept = [] if self.overwrite else read_rows(self.output, bench.header)
        check_output(self.output.parent, "output")
        results = run_bench(
            lambda: source.load(**place),
            bench,
            rows,
            output=self.output,
            rows=kept,
            on_row=_show,
        )
        if self.format == "json":
            print_json(results)
            return
        print_line("\n".join(table_lines(results)))

    def _rows(self) -> dict[str, Any]:
        from dit_accel.llm.prefill import pattern_names
        from dit_accel.llm.settings import prefill_settings

        found: dict[str, Any] = {}
        for name in self.patterns or pattern_names():
            config = prefill_settings(name)
            row = Path(name).stem if Path(name).is_file() else name
            if config is None or row in (*found, "dense"):
                raise ValueError(
                    f"patterns: {name!r} is there already; accepted are different names, and dense is always a row"
                )
            found[row] = config
        return found


def _show(row: dict[str, Any]) -> None:
    sys.stderr.write(f"{row['name']}: {row['seconds']:.0f} s\n")
