"""The table of an evaluation: its cells, as Markdown and as lines for a terminal."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dit_accel.eval.results.types import MetricValue, Results, Row, reference_row
from dit_accel.eval.view import cells, definitions
from dit_accel.eval.view.cells import Cell
from dit_accel.eval.view.definitions import Definition, definition
from dit_accel.eval.view.equal_time import VERDICTS, equal_time
from dit_accel.runtime.summary import table as aligned

READING = (
    "Quality: value [95 % interval] Δ difference to the reference. Seconds: median "
    "(quartiles) of measured calls. Bold: best of the column."
)


@dataclass(frozen=True)
class Column:
    """Heading of a column, and what all of its cells share."""

    key: str
    group: str
    label: str
    unit: str
    about: Definition
    n: str = ""  # number of samples or calls, if all rows have the same
    note: str = ""  # limits of the values, if all rows have the same

    @property
    def arrow(self) -> str:
        """Arrow in the direction of better values."""
        return {None: "", "higher": "↑", "lower": "↓"}[self.about.better]


@dataclass(frozen=True)
class Line:
    """A row of results.json with its cells."""

    row: Row
    reference: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """All columns and lines, in the order of results.json."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings over neighbouring columns, with the number of columns."""
        names = [x.group for x in self.columns]
        return [(name, names.count(name)) for name in dict.fromkeys(names)]


def metric_keys(results: Results) -> list[str]:
    """Return the metrics that any row has, in their usual order."""
    found = {key for row in results["rows"] for key in row["metrics"]}
    return sorted(found, key=definitions.usual_order)


def metric_unit(results: Results, key: str) -> str:
    """Return the unit of a metric if it is short; the details of the page name the others."""
    units = {row["metrics"][key]["unit"] for row in results["rows"] if key in row["metrics"]}
    return cells.short(" / ".join(sorted(units)))


def build_table(results: Results) -> Table:
    """Return the cells of every row. The best value of a column is marked, unless most rows have it."""
    rows, reference = results["rows"], reference_row(results)
    columns, made = [], []
    for column, cell in _columns(results, reference):
        own = [cell(row) if row["available"] else Cell() for row in rows]
        known = [x for x in own if x.value is not None]
        if not known and column.group != "Quality":
            continue  # not measured
        sizes, notes = {x.n for x in known if x.n}, {x.note for x in known}
        n, note = (x.pop() if len(x) == 1 else "" for x in (sizes, notes))
        columns.append(replace(column, n=n, note=note))
        if column.about.better and known:
            values = [x.value for x in known if x.value is not None]
            best = (max if column.about.better == "higher" else min)(values)
            if 2 * values.count(best) <= len(values):
                own = [replace(x, best=x.value == best) for x in own]
        made.append(own)
    lines = [Line(row, row is reference, tuple(x[i] for x in made)) for i, row in enumerate(rows)]
    return Table(tuple(columns), tuple(lines))


_Made = tuple[Column, Callable[[Row], Cell]]


def _columns(results: Results, reference: Row) -> Iterator[_Made]:
    """Yield columns, and the function from a row to the cell. Cost and quality of the whole call come first."""

    def seconds(group: str, label: str, phase: str) -> _Made:
        column = Column(f"seconds_{phase}", group, label, "s", definitions.SECONDS)
        return column, lambda row: cells.seconds_cell(row["seconds"].get(phase))

    def speedup(group: str, label: str, phase: str) -> _Made:
        def cell(row: Row) -> Cell:
            took, value = row["seconds"].get(phase), (row["speedup"] or {}).get(phase)
            return cells.speedup_cell(value, took, reference["seconds"].get(phase))

        return Column(f"speedup_{phase}", group, label, "", definitions.SPEEDUP), cell

    def counted(key: str, unit: str, about: Definition, cell: Callable[[Row], Cell]) -> _Made:
        return Column(key, "Resources", about.label, unit, about), cell

    def memory(row: Row) -> Cell:
        sizes = (x["peak_memory_bytes"] for x in (row, reference))
        size, other = (None if x is None else x / 2**20 for x in sizes)
        return cells.plain_cell(size, definitions.MEMORY, None if row is reference else other)

    yield seconds("Whole call", "Seconds", "total")
    yield speedup("Whole call", "Speed-up", "total")
    for key in metric_keys(results):
        about = definition(key)
        column = Column(key, "Quality", about.label, metric_unit(results, key), about)
        yield column, lambda row, key=key: _quality(row, key, reference)  # type: ignore[misc]
    yield speedup("Parts of a call", "Denoise speed-up", "denoise")
    for phase in ("text", "denoise", "decode"):
        yield seconds("Parts of a call", phase.capitalize(), phase)
    kinds = {str(row["peak_memory_of"]) for row in results["rows"] if row["peak_memory_of"]}
    unit = f"MiB, {' or '.join(sorted(kinds))}"
    yield counted("peak_memory_bytes", unit, definitions.MEMORY, memory)
    yield counted("density", "", definitions.DENSITY, _density)
    cost = definitions.COST
    yield counted("cost", "dense steps", cost, lambda x: cells.plain_cell(x["cost"], cost))


def _quality(row: Row, key: str, reference: Row) -> Cell:
    found, about = row["metrics"].get(key), definition(key)
    if row is not reference:
        return cells.metric_cell(found, about, reference["metrics"].get(key))
    if found is None and about.of_reference:
        return Cell("reference", note="the other rows are compared with this row")
    return cells.metric_cell(found, about)


def _density(row: Row) -> Cell:
    cell = cells.plain_cell(row["density"], definitions.DENSITY)
    dense = row["settings"].get("dense_calls")
    if row["density"] == 1 and isinstance(dense, dict) and dense:  # say why nothing ran sparse
        return replace(cell, note=f"ran dense: {', '.join(dense)}")
    return cell


def markdown(results: Results, title: str | None = None) -> str:
    """Return table.md: the table, and the comparison at equal time."""
    fine = results.get("fine")
    about = f", fine run of {fine['num_inference_steps']} steps" if fine else ""
    lines = [
        f"# {escape(title or results['title'])}",
        "",
        f"Model {escape(results['model'])}, {results['prompts']} prompts, "
        f"measured calls: {results['repeats']}, reference {escape(results['reference'])}{about}. {READING}",
        "",
        *_markdown_table(build_table(results)),
    ]
    found = {key: equal_time(results, key, "total") for key in metric_keys(results)}
    if any(found.values()):
        lines += ["", "## At equal time", ""]
        lines += ["Compared with dense sampling with fewer steps, by total seconds."]
    for key, comparisons in found.items():
        if comparisons:
            lines += ["", f"{escape(definition(key).label)}:", ""]
        for x in comparisons:
            difference = " ".join(y for y in (x.difference, escape(x.interval)) if y)
            said = ", ".join(y for y in (difference, VERDICTS[x.verdict]) if y)
            lines.append(f"- {escape(x.name)}: {said} ({x.basis})")
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> Iterator[str]:
    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    def heading(column: Column) -> str:
        extra = [x for x in (column.unit, column.n and f"n = {column.n}", column.note) if x]
        text = f"{escape(column.label)} {column.arrow}".strip()
        return f"{text} ({escape(', '.join(extra))})" if extra else text

    def shown(cell: Cell, column: Column) -> str:
        if cell.value is None:
            return escape(cell.text)
        text = f"**{cell.text}**" if cell.best else cell.text
        n = f"n = {cell.n}" if cell.n and not column.n else ""
        note = cell.note if not column.note and math.isfinite(cell.value) else ""
        parts = (text, cell.range, cell.delta and f"Δ {cell.delta}", n, note)
        return " ".join(part for part in parts if part)

    width = len(table.columns)
    yield line(["method", "steps", *map(heading, table.columns)])
    yield line(["---", *["---:"] * (width + 1)])
    for entry in table.lines:
        row = entry.row
        texts = [shown(*pair) for pair in zip(entry.cells, table.columns, strict=True)]
        if not row["available"]:
            texts = [f"not available: {escape(row['why'] or '')}", *[""] * (width - 1)][:width]
        yield line([escape(row["name"]), str(row["num_inference_steps"]), *texts])


def escape(text: str) -> str:
    """Return one line that Markdown shows as plain text: names and reasons may hold anything."""
    return re.sub(r"([\\`*_|<\[\]~])", r"\\\1", " ".join(text.split()))


def results_text(results: Results, *, parts: bool = False) -> str:
    """Return the table for a terminal: values only, and the parts of a call only with `parts`."""
    table = build_table(results)
    shown = {
        i: f"{x.label} {x.unit}".strip()
        for i, x in enumerate(table.columns)
        if (parts or x.group != "Parts of a call") and not x.key.startswith("judge_")
    }
    rows = [("", "steps", *shown.values())]
    for line in table.lines:
        row = line.row
        texts = [line.cells[i].text for i in shown] if row["available"] else [row["why"] or ""]
        rows.append((row["name"], str(row["num_inference_steps"]), *texts))
    return aligned(rows)


def metrics_lines(metrics: Mapping[str, MetricValue]) -> list[str]:
    """Return one line for each metric of a sample set, with interval, size and network."""
    out, width = [], max(map(len, metrics), default=0) + 2
    for name, metric in metrics.items():
        cell, network = cells.metric_cell(metric, definition(name)), metric["extractor"]
        size = f" against {metric['n_reference']}" if "n_reference" in metric else ""
        resize = network and network.get("resize") and f"resize {network['resize']}"
        notes = [f"n = {cell.n}{size}", network and network["id"], resize, cell.note]
        text = " ".join(x for x in (cell.text, metric["unit"], cell.range) if x)
        out.append(f"{name:{width}}{text}  ({', '.join(x for x in notes if x)})")
    return out
