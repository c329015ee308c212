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
    """Texts and tasks of the benchmark."""

    length: int = 4096
    """Number of tokens of each text and of each passkey prompt."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (Python documentation), code (source of the Python library), or UTF-8 text files. Without texts and with
    --passkeys 0, the language model is not loaded and only retrieval is measured."""
    passkeys: int = 8
    """Number of passkey prompts; 0: none."""
    retrieval_lengths: tuple[int, ...] = (4096,)
    """Prompt lengths of the retrieval tasks on the handwritten model, at most 32768 tokens."""
    retrieval_prompts: int = 8
    """Number of prompts per retrieval task and length; 0: none."""
    seed: int = 0
    """Random seed of the prompts."""


@dataclass(kw_only=True)
class Bench(LanguageModelOptions):
    """Print a table of the quality of prefill patterns: perplexity, KL and top-1 agreement on texts, passkeys, and retrieval
    tasks on a model with handwritten weights. An interrupted run resumes from its results file."""

    patterns: tuple[str, ...] = ()
    """Table rows beside dense: names of patterns or presets, YAML files, or JSON files of llm search. Default: all patterns
    with their default options."""
    tasks: OmitArgPrefixes[Tasks] = field(default_factory=Tasks)
    output: Path = Path("outputs/llm-bench.json")
    """Results file, written after each row."""
    overwrite: bool = False
    """Replace a results file that was made with other settings."""

    def run(self) -> None:
        from dit_accel.llm.bench.run import BenchSettings, prepare, read_rows, run_bench
        from dit_accel.llm.bench.table import table_lines

        if self.output.is_dir():
            raise ValueError(
                f"output={str(self.output)!r}: is a folder; must be the name of a file"
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
                    f"patterns: {name!r} is already a row; must be different names, not dense"
                )
            found[row] = config
        return found


def _show(row: dict[str, Any]) -> None:
    sys.stderr.write(f"{row['name']}: {row['seconds']:.0f} s\n")
