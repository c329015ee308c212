"""`measure_heads` and `choose_heads`: choose a pattern for each head, or each group of heads, at a total density."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_accel.config.prefill import DENSE
from dit_accel.llm.prefill import pattern_of
from dit_accel.llm.search.allocate import DENSE as DENSE_INDEX
from dit_accel.llm.search.allocate import allocate
from dit_accel.llm.search.journal import Journal
from dit_accel.llm.search.measure import measure_sample
from dit_accel.llm.search.samples import Sample
from dit_accel.llm.search.settings import SearchSettings


def measure_heads(
    model: Callable[[], Any],
    samples: Sequence[Sample],
    settings: SearchSettings,
    num_layers: int,
    journal: Journal,
    on_step: Callable[[], None],
) -> None:
    """Measure all candidates on all samples, except for measurements that the journal contains.

    Args:
        model: function that returns the model; called only if a measurement is missing.
        samples: samples. Held-out samples are skipped.
        settings: candidates, block size and tail.
        num_layers: number of layers of the model.
        journal: journal of the measurements; new ones are added.
        on_step: called after each layer of a sample.
    """
    patterns = [pattern_of(x["pattern"], x.get("options")) for x in settings.candidates.values()]
    for sample in samples:
        missing = {i for i in range(num_layers) if _key(sample, i) not in journal}
        if sample.held_out or not missing:
            continue

        def keep(layer: int, found: dict[str, Any], sample: Sample = sample) -> None:
            journal[_key(sample, layer)] = found
            on_step()

        measure_sample(
            model(),
            sample.ids,
            patterns,
            missing,
            block=settings.block,
            tail=settings.tail,
            on_layer=keep,
        )


def measured(samples: Sequence[Sample], num_layers: int, journal: Journal) -> int:
    """Return the number of pairs of sample and layer that the journal contains."""
    return sum(_key(x, i) in journal for x in samples if not x.held_out for i in range(num_layers))


def choose_heads(
    samples: Sequence[Sample],
    settings: SearchSettings,
    num_layers: int,
    counts: Mapping[str, int],
    journal: Journal,
) -> dict[str, Any]:
    """Return the chosen patterns (`chosen`), and the density and error expected from the measurements.

    Args:
        samples: samples of the measurements.
        settings: candidates and density budget.
        num_layers: number of layers of the model.
        counts: number of entries per layer with `by="head"` and `by="group"`.
        journal: journal with complete measurements.

    Raises:
        ValueError: the cheapest candidates cost more than the budget.
    """
    entries = counts[settings.by]
    costs: list[list[float]] = []
    errors: list[list[float]] = []
    for layer in range(num_layers):
        parts = [journal[_key(x, layer)] for x in samples if not x.held_out]
        for kind, into in (("costs", costs), ("errors", errors)):
            tables = [part[kind] for part in parts if part[kind]]
            for entry in range(entries):
                into.append([_mean(tables, c, entry, entries, kind) for c in range(len(tables[0]))] if tables else [])  # fmt: skip
    picked = allocate(costs, errors, settings.density)
    names = [*settings.candidates]
    flat = [DENSE if i == DENSE_INDEX else names[i] for i in picked]
    spent = [1.0 if i == DENSE_INDEX else c[i] for i, c in zip(picked, costs, strict=True)]
    wrong = [0.0 if i == DENSE_INDEX else e[i] for i, e in zip(picked, errors, strict=True)]
    return {
        "chosen": [flat[i : i + entries] for i in range(0, len(flat), entries)],
        "density": sum(spent) / len(spent),
        "error": sum(wrong),
        "density_by_layer": [sum(spent[i : i + entries]) / entries for i in range(0, len(spent), entries)],
    }  # fmt: skip


def candidate_seconds(
    samples: Sequence[Sample], settings: SearchSettings, num_layers: int, journal: Journal
) -> dict[str, float]:
    """Return the time of each candidate (plan and attention of all heads), divided by that of dense attention."""
    parts = [journal[_key(x, i)] for x in samples if not x.held_out for i in range(num_layers)]
    parts = [x for x in parts if x["seconds"]]
    dense = sum(x["dense_seconds"] for x in parts)
    return {
        name: round(sum(x["seconds"][i] for x in parts) / dense, 2)
        for i, name in enumerate(settings.candidates if dense else ())
    }


def _mean(tables: Sequence[Any], candidate: int, entry: int, entries: int, kind: str) -> float:
    """Return the cost or error of a candidate in one head or group (mean over samples). Errors in a group are summed."""
    total = 0.0
    for table in tables:
        row = table[candidate]
        group = len(row) // entries
        some = row[entry * group : (entry + 1) * group]
        total += sum(some) if kind == "errors" else sum(some) / group
    return total / len(tables)


def _key(sample: Sample, layer: int) -> str:
    return f"{sample.name}/{layer}"
