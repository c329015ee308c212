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
    """Search for prefill patterns by head at a total density, or for the layers that tolerate Triangle (TriangleMix).

    The result is a JSON file for --prefill. Measurements lie beside it, in a file that ends with .journal.json: started
    again after a kill, or with another --density, the search goes on from there.
    """

    find: Literal["heads", "groups", "layers"] = "heads"
    """heads: a pattern for each query head; groups: for the query heads that share keys; layers: the layers that tolerate
    Triangle in all heads."""
    density: float = 0.3
    """Share of the query-key pairs that may be read, a mean over heads and layers; for heads and groups."""
    max_layers: int | None = None
    """Layers with Triangle at most, for layers. Default: a third of them."""
    max_kl: float = 0.01
    """Largest mean KL(dense || sparse) of the last 128 positions on held-out samples, in nats, for layers."""
    candidates: Path | None = None
    """YAML file with patterns to choose from: {name: {pattern: hybrid, options: {top_p: 0.8}}, ...}. Default: patterns
    whose budgets grow with the prompt."""
    length: int = 4096
    """Tokens of each sample."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose (documentation of this Python), code (modules of its library), or text files in UTF-8. Samples come from the
    second half of each, which llm bench does not read."""
    samples: int = 2
    """Samples of each text that are measured."""
    checks: int = 1
    """Further samples of each text, on which the result is checked."""
    block: int = 64
    """Tokens per block: 16, 32, 64 or 128."""
    tail: int = 128
    """Last queries that read every key, at least."""
    output: Path = Path("outputs/llm-search.json")
    """Result file."""
    overwrite: bool = False
    """Replace files that were made with other settings."""

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
