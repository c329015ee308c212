"""`dit-accel llm search`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_accel.cli.llm_options import LanguageModelOptions
from dit_accel.cli.options import check_output
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Search(LanguageModelOptions):
    """Search for a prefill pattern for each head at a total density, or for the layers that tolerate Triangle (TriangleMix).

    The result is a JSON file for --prefill. The measurements are saved beside it in a file that ends with .journal.json. An
    interrupted search, or a search with another --density, reuses them.
    """

    find: Literal["heads", "groups", "layers"] = "heads"
    """heads: find a pattern for each query head; groups: for each group of query heads that share keys; layers: find the
    layers that tolerate Triangle in all heads."""
    density: float = 0.3
    """Mean share of the query-key pairs over heads and layers, with --find heads or groups."""
    max_layers: int | None = None
    """Maximum number of layers with Triangle, with --find layers. Default: a third of all layers."""
    max_kl: float = 0.01
    """Largest mean KL(dense || sparse) of the last 128 positions on held-out samples in nats, with --find layers."""
    candidates: Path | None = None
    """YAML file with candidate patterns: {name: {pattern: hybrid, options: {top_p: 0.8}}, ...}. Default: patterns whose
    budgets grow with the prompt."""
    length: int = 4096
    """Number of tokens per sample."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (Python documentation), code (source of the Python library), or UTF-8 text files. Samples are taken from the
    second half of each text, which llm bench does not use."""
    samples: int = 2
    """Number of samples from each text for the measurements."""
    checks: int = 1
    """Number of further samples from each text on which the result is checked."""
    block: int = 64
    """Number of tokens per block: 16, 32, 64 or 128."""
    tail: int = 128
    """Smallest number of last queries that read every key."""
    output: Path = Path("outputs/llm-search.json")
    """Result file."""
    overwrite: bool = False
    """Replace a result file and a journal that were made with other settings."""

    def run(self) -> None:
        from dit_accel.llm.search.run import Search as Run
        from dit_accel.llm.search.run import check_files, result_lines
        from dit_accel.llm.search.settings import SearchSettings, read_candidates

        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "find", "density", "max_layers", "max_kl", "length", "texts", "samples", "checks", "block", "tail",
            )
        }  # fmt: skip
        if self.candidates is not None:
            given["candidates"] = read_candidates(self.candidates)
        settings = SearchSettings(**given)
        if not self.overwrite:
            check_files(self.output)
        place = self.place()
        source = self.source()
        search = Run(
            source,
            settings,
            dtype=str(place["dtype"]).removeprefix("torch."),
            device=place["device"].type,
        )
        search.journal(self.output, overwrite=self.overwrite)
        check_output(self.output.parent, "output")
        result = search.run(
            lambda: source.load(**place),
            output=self.output,
            overwrite=self.overwrite,
            show=sys.stderr.isatty(),
        )
        if self.format == "json":
            print_json(result)
            return
        print_line("\n".join(result_lines(result)))
        print_line(str(self.output))
