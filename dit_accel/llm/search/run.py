"""`Search`: runs a pattern search, checks its result and writes it to a file."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit_accel.config import PrefillConfig
from dit_accel.config.base import as_lists
from dit_accel.config.prefill_file import FORMAT_VERSION, KIND, search_settings
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.llm.bench.texts import text_hash
from dit_accel.llm.head_counts import head_counts
from dit_accel.llm.loading import ModelSource
from dit_accel.llm.quality import compare
from dit_accel.llm.search import heads, layers
from dit_accel.llm.search.journal import Journal
from dit_accel.llm.search.samples import Sample, make_samples
from dit_accel.llm.search.settings import SearchSettings

RESULT_ONLY = ("density", "max_layers", "max_kl")
"""Settings that affect only the choice, so that measurements can be reused when they change."""


class Search:
    """Pattern search whose arguments are checked before the model is loaded.

    Args:
        source: source of the model.
        settings: settings of the search.
        dtype, device: dtype and device of the model, for the journal.

    Raises:
        ValueError: a text is too short, or the length is larger than the model supports.
    """

    def __init__(self, source: ModelSource, settings: SearchSettings, *, dtype: str, device: str) -> None:  # fmt: skip
        source.check_length("length", settings.length)
        counts = head_counts(source.config)
        if counts is None:
            raise ValueError(f"model={source.name!r}: must have num_attention_heads in its config")
        self.source, self.settings = source, settings
        self.counts = {"head": counts.heads, "group": counts.kv_heads}
        self.samples: list[Sample] = make_samples(source.tokenizer, settings)
        values = {k: as_lists(x) for k, x in asdict(settings).items()}
        candidates = values.pop("candidates")
        self.bounds = {name: values.pop(name) for name in RESULT_ONLY}
        self.header: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": source.name,
            "revision": source.revision,
            "dtype": dtype,
            "device": device,
            "settings": values,
            "candidates": candidates,
            "samples": [x.to_dict() for x in self.samples],
            "versions": versions(),
            "machine": machine(),
        }

    def journal(self, output: Path | None, *, overwrite: bool = False) -> Journal:
        """Return the journal beside a result file. Arguments and errors as in `run`."""
        path = None if output is None else journal_path(output)
        return Journal(path, self.header, overwrite=overwrite)

    def run(
        self,
        load: Callable[[], Any],
        *,
        output: Path | None = None,
        overwrite: bool = False,
        show: bool = False,
    ) -> dict[str, Any]:
        """Run the search and return the result. Measurements that the journal contains are not repeated.

        Args:
            load: function that loads the model; called at most once, and only if a measurement is missing.
            output: JSON file for the result. The journal is beside it, see `journal_path`.
            overwrite: replace a journal with other settings.
            show: show a progress bar on stderr.

        Raises:
            ValueError: the journal has other settings, or the density is below that of the cheapest candidates.
        """
        journal = self.journal(output, overwrite=overwrite)
        loaded: list[Any] = []

        def model() -> Any:
            if not loaded:
                loaded.append(load())
            return loaded[0]

        result = self._result(self._chosen(model, journal, show))
        result["checks"] = self._checks(model, journal, result)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, result)
        return result

    def _chosen(self, model: Callable[[], Any], journal: Journal, show: bool) -> dict[str, Any]:
        """Run the measurements and return the choice with its statistics."""
        number, settings = self.source.num_layers, self.settings
        used = sum(not x.held_out for x in self.samples)
        by_layer = settings.find == "layers"
        done = (layers if by_layer else heads).measured(self.samples, number, journal)
        with tqdm(total=used * number, initial=done, desc="search", unit="layer", disable=not show) as bar:  # fmt: skip

            def step() -> None:
                bar.update()

            if by_layer:
                found = layers.rank_layers(model, self.samples, settings, number, journal, step)
            else:
                heads.measure_heads(model, self.samples, settings, number, journal, step)
        if by_layer:
            return layers.choose_layers(model, self.samples, settings, found, journal)
        chosen = heads.choose_heads(self.samples, settings, number, self.counts, journal)
        return {
            **chosen,
            "seconds_over_dense": heads.candidate_seconds(self.samples, settings, number, journal),
        }

    def _result(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of the result file without checks."""
        head = {k: x for k, x in self.header.items() if k not in ("versions", "machine")}
        return {
            "format_version": head.pop("format_version"),
            "kind": KIND,
            **head,
            "layers": self.source.num_layers,
            "heads": self.counts["head"],
            "kv_heads": self.counts["group"],
            "by": self.settings.by,
            "block": self.settings.block,
            "tail": self.settings.tail,
            "bounds": self.bounds,
            **chosen,
            "versions": self.header["versions"],
            "machine": self.header["machine"],
        }

    def _checks(
        self, model: Callable[[], Any], journal: Journal, result: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the comparison with dense prefill on each held-out sample."""
        config = PrefillConfig(**search_settings(result), crossover=0)
        found = []
        for sample in self.samples:
            if not sample.held_out:
                continue
            key = f"check/{sample.name}/{text_hash(json.dumps(result['chosen']))}"
            if key not in journal:
                journal[key] = asdict(compare(model(), sample.ids, config))
            found.append({"sample": sample.name, **journal[key]})
        return found


def journal_path(output: Path) -> Path:
    """Return the path of the journal beside a result file."""
    return output.with_name(f"{output.stem}.journal.json")


def check_files(output: Path) -> None:
    """Check that a result can be written to `output`.

    Raises:
        ValueError: the path does not end with .json, or is a folder or a file that is not the result of a search.
    """
    if output.suffix.lower() != ".json" or output.is_dir():
        raise ValueError(f"output={str(output)!r}: must be the name of a .json file")
    if not output.exists():
        return
    try:
        known = json.loads(output.read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise ValueError(
            f"output={str(output)!r}: is not a result of llm search; pass a new file or --overwrite"
        )


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a printed result: the choice, and the comparison with dense prefill on held-out samples."""
    lines = []
    if "layers_found" in result:
        found = ", ".join(map(str, result["layers_found"])) or "none"
        (name,) = result["candidates"]
        lines.append(f"{name} in {len(result['layers_found'])} layers: {found}")
    else:
        counts = Counter(name for names in result["chosen"] for name in names)
        lines.append(f"density {result['density']:.3f} of {result['bounds']['density']:g}, by {result['by']}:")  # fmt: skip
        lines += [f"  {name:<20} {number}" for name, number in counts.most_common()]
    for x in result["checks"]:
        lines.append(
            f"{x['sample']}: density {x['density']:.3f}, perplexity {x['perplexity_percent']:+.2f} %, KL {x['kl']:.4f}, "
            f"top-1 {x['top1']:.3f}"
        )
    return lines
