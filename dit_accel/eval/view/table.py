"""The table of methods: the same cells for table.md and for the page."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from dit_accel.eval.results.types import Results, Row, reference_row
from dit_accel.eval.view.cells import (
    Cell,
    figure_cell,
    memory_cell,
    plain_cell,
    seconds_cell,
    short,
    speedup_cell,
)
from dit_accel.eval.view.definitions import (
    COST,
    DENSITY,
    MEMORY,
    SECONDS,
    SPEEDUP,
    Better,
    definition,
    usual_order,
)


@dataclass(frozen=True)
class Column:
    """What the cells below a heading are."""

    key: str
    group: str
    label: str
    unit: str
    better: Better | None
    text: str
    """The definition."""
    n: str = ""
    note: str = ""
    """What each figure rests on, and what to know about it, where that is the same in all rows."""

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return "" if self.better is None else "↑" if self.better == "higher" else "↓"


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: str
    method: str
    steps: int
    available: bool
    why: str
    reference: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """All of it, in the order of results.json."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings over neighbouring columns, with how many."""
        out: list[tuple[str, int]] = []
        for column in self.columns:
            if out and out[-1][0] == column.group:
                out[-1] = (column.group, out[-1][1] + 1)
            else:
                out.append((column.group, 1))
        return out


def metric_keys(results: Results) -> list[str]:
    """Metrics that any row has, in their usual order."""
    found = {key for row in results["rows"] for key in row["metrics"]}
    return sorted(found, key=usual_order)


def metric_unit(results: Results, key: str) -> str:
    """The unit of a metric."""
    units = {row["metrics"][key]["unit"] for row in results["rows"] if key in row["metrics"]}
    return " / ".join(sorted(units))


def build_table(results: Results) -> Table:
    """Cells of every row; the best value of a column is marked unless most rows have it."""
    rows, reference = results["rows"], reference_row(results)
    columns, columns_of_cells = [], []
    for column, cell in _columns(results):
        cells = [cell(row) if row["available"] else Cell() for row in rows]
        columns.append(
            replace(
                column,
                n=_common(x.n for x in cells if x.n and x.value is not None),
                note=_common(x.note for x in cells if x.value is not None),
            )
        )
        columns_of_cells.append(_mark(cells, column.better))
    lines = [
        Line(
            row["name"],
            row["method"],
            row["num_inference_steps"],
            row["available"],
            row["why"] or "",
            row is reference,
            tuple(cells[i] for cells in columns_of_cells),
        )
        for i, row in enumerate(rows)
    ]
    return Table(tuple(columns), tuple(lines))


_Made = tuple[Column, Callable[[Row], Cell]]


def _columns(results: Results) -> Iterator[_Made]:
    rows, reference = results["rows"], reference_row(results)
    timed = {phase for row in rows for phase in row["seconds"]}
    fast = any(row["speedup"] for row in rows)

    def seconds(group: str, label: str, phase: str) -> Iterator[_Made]:
        if phase in timed:
            column = Column(f"seconds_{phase}", group, label, "s", SECONDS.better, SECONDS.text)
            yield column, partial(_seconds, phase)

    def speedup(group: str, label: str, phase: str) -> Iterator[_Made]:
        if fast:
            column = Column(f"speedup_{phase}", group, label, "", SPEEDUP.better, SPEEDUP.text)
            yield column, partial(_speedup, phase, reference)

    # What a reader looks for comes first: what it costs and what it is worth.
    yield from seconds("Whole call", "Seconds", "total")
    yield from speedup("Whole call", "Speed-up", "total")
    for key in metric_keys(results):
        about, unit = definition(key), short(metric_unit(results, key))
        column = Column(key, "Quality", about.label, unit, about.better, about.text)
        yield column, partial(_quality, key, reference)
    yield from speedup("Parts of a call", "Denoise speed-up", "denoise")
    for phase in ("text", "denoise", "decode"):
        yield from seconds("Parts of a call", phase.capitalize(), phase)
    kinds = {row["peak_memory_of"] for row in rows if row["peak_memory_bytes"] is not None}
    if kinds:
        unit = f"MiB, {' or '.join(sorted(map(str, kinds)))}"
        key = "peak_memory_bytes"
        yield (
            Column(key, "Resources", MEMORY.label, unit, MEMORY.better, MEMORY.text),
            partial(_memory, reference),
        )
    if any(row["density"] is not None for row in rows):
        yield (
            Column("density", "Resources", DENSITY.label, "", None, DENSITY.text),
            _density,
        )
    if any(row["cost"] is not None for row in rows):
        yield (
            Column("cost", "Resources", COST.label, "dense steps", None, COST.text),
            lambda row: plain_cell(row["cost"], COST),
        )


def _quality(key: str, reference: Row, row: Row) -> Cell:
    figure, about = row["metrics"].get(key), definition(key)
    if row is reference:
        if figure is None and about.of_reference:
            return Cell("reference", note="the others are compared with this row")
        return figure_cell(figure, about)
    return figure_cell(figure, about, reference["metrics"].get(key))


def _seconds(phase: str, row: Row) -> Cell:
    return seconds_cell(row["seconds"].get(phase))


def _speedup(phase: str, reference: Row, row: Row) -> Cell:
    value = None if row["speedup"] is None else row["speedup"][phase]
    return speedup_cell(value, row["seconds"].get(phase), reference["seconds"].get(phase))


def _density(row: Row) -> Cell:
    cell, dense = plain_cell(row["density"], DENSITY), row["settings"].get("dense_calls")
    if (
        row["density"] == 1 and isinstance(dense, dict) and dense
    ):  # or a reader wonders what was tested
        return replace(cell, note=f"ran dense: {', '.join(dense)}")
    return cell


def _memory(reference: Row, row: Row) -> Cell:
    other = None if row is reference else reference["peak_memory_bytes"]
    return memory_cell(row["peak_memory_bytes"], other)


def _common(texts: Iterable[str]) -> str:
    found = set(texts)
    return found.pop() if len(found) == 1 else ""


def _mark(column: list[Cell], better: Better | None) -> list[Cell]:
    values = [cell.value for cell in column if cell.value is not None]
    if better is None or not values:
        return column
    best = (max if better == "higher" else min)(values)
    if 2 * values.count(best) > len(values):  # what most rows reach distinguishes none
        return column
    return [replace(cell, best=cell.value == best) for cell in column]
