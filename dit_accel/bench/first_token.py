"""Benchmark of the time to the first token of a language model, dense and sparse (kernels/bench_prefill.py)."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from tqdm import tqdm

from dit_accel.bench.prefill_speed import DTYPES, FORMAT_VERSION
from dit_accel.bench.timing import seconds
from dit_accel.config import PrefillConfig
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.llm.attention import POLICY
from dit_accel.llm.bench.texts import read_text
from dit_accel.llm.control import disable, enable, summary
from dit_accel.llm.loading import read_source
from dit_accel.llm.prefill import Prompt
from dit_accel.llm.report import prompt_density
from dit_accel.llm.settings import prefill_settings

DENSE = "dense (sdpa)"
ALWAYS = "sparse at every length"


@dataclass
class FirstToken:
    """Seconds to the first token of a prompt: dense attention of transformers against presets of sparse prefill."""

    output: Path
    model: str = "smollm2-135m"
    """Name of an embedded model, or a model repository; see `dit-accel llm generate --help`."""
    text: str = "prose"
    """Text of the prompt: prose, code, or the path of a text file."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    prefill: tuple[str, ...] = ("quality", "balanced", "fast")
    """Presets, patterns or YAML files. Each runs with its own crossover, and the first one also sparse at every length."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    repeats: int = 3
    threads: int = 1
    device: str = "cpu"

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        source = read_source(self.model)
        ids = source.tokenizer(read_text(self.text)[: 40 * max(self.lengths)], return_tensors="pt")
        rows: list[dict[str, Any]] = []
        bar = tqdm(total=len(self.dtypes) * len(self.lengths), desc=self.model)
        for dtype in self.dtypes:
            model = source.load(dtype=DTYPES[dtype], device=self.device)
            for length in self.lengths:
                bar.set_postfix_str(f"{dtype} {length}")
                prompt = ids.input_ids[:, :length].to(self.device)
                if prompt.shape[1] < length:
                    raise ValueError(
                        f"text={self.text!r}: {prompt.shape[1]} tokens; accepted are texts of at least {length} tokens"
                    )
                for row in self._measure(model, prompt):
                    rows.append({"length": length, "dtype": dtype, **row})
                bar.update()
                write_json(self.output, self._record(rows))
        print_table(self._record(rows))

    def _record(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "text": self.text,
            "threads": self.threads,
            "repeats": self.repeats,
            "rows": rows,
            "versions": versions(),
            "machine": machine(),
        }

    @torch.inference_mode()
    def _measure(self, model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
        settings = {name: prefill_settings(name) for name in self.prefill}
        first = settings[self.prefill[0]]
        settings[f"{self.prefill[0]}, {ALWAYS}"] = PrefillConfig.from_dict(
            {**vars(first), "crossover": 0}
        )
        more: dict[str, dict[str, Any]] = {DENSE: {}}
        functions: dict[str, Callable[[], Any]] = {
            DENSE: lambda: model(ids, use_cache=False, logits_to_keep=1)
        }
        for name, config in settings.items():
            more[name] = {}

            def call(config: Any = config, kept: dict[str, Any] = more[name]) -> None:
                enable(model, prefill=config)
                try:
                    with _timed_plans(model) as planning:
                        model(ids, use_cache=False, logits_to_keep=1)
                    kept.setdefault("density", prompt_density(summary(model)))
                    kept.setdefault("planning", []).append(sum(planning))
                finally:
                    disable(model)

            functions[name] = call
        found = seconds(functions, self.repeats, self.device)
        dense = statistics.median(found[DENSE])
        rows = []
        for name, times in found.items():
            took = statistics.median(times)
            row = {"kind": name, "seconds": took, "dense_over_this": dense / took}
            if more[name]:
                row["density"] = more[name]["density"]
                if self.device == "cpu":  # on a GPU, CPU time does not include queued work
                    row["planning_seconds"] = statistics.median(more[name]["planning"][1:])
            rows.append(row)
        return rows


@contextmanager
def _timed_plans(model: Any) -> Iterator[list[float]]:
    """Context manager that yields a list of the CPU seconds of each plan that an enabled model makes."""
    policy = next(x for m in model.modules() if (x := vars(m).get(POLICY)) is not None)
    times: list[float] = []

    def timed(plan: Callable[[Prompt], Any]) -> Callable[[Prompt], Any]:
        def call(prompt: Prompt) -> Any:
            start = time.process_time()
            made = plan(prompt)
            times.append(time.process_time() - start)
            return made

        return call

    before = policy.patterns
    policy.patterns = [x and SimpleNamespace(plan=timed(x.plan)) for x in before]
    try:
        yield times
    finally:
        policy.patterns = before


def print_table(record: dict[str, Any]) -> None:
    """Print a table for each dtype: speed-up over dense attention by setting and length."""
    rows = record["rows"]
    for dtype in dict.fromkeys(x["dtype"] for x in rows):
        some = [x for x in rows if x["dtype"] == dtype]
        lengths = sorted({x["length"] for x in some})
        print(f"\n{record['model']}, {dtype}, {record['threads']} thread(s): dense over this\n")
        print(f"| | {' | '.join(str(n) for n in lengths)} |\n|{'---|' * (len(lengths) + 1)}")
        for kind in dict.fromkeys(x["kind"] for x in some):
            cells = []
            for n in lengths:
                x = next(x for x in some if (x["length"], x["kind"]) == (n, kind))
                shown = f"{x['seconds']:.1f} s" if kind == DENSE else f"{x['dense_over_this']:.2f}x"
                density = x.get("density")
                cells.append(shown if density is None else f"{shown} ({density:.2f})")
            print(f"| {kind} | {' | '.join(cells)} |")
