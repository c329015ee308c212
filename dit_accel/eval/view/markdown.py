"""table.md: the table of methods and the comparison at equal time, as GitHub Markdown."""

import math
import re
from collections.abc import Iterable

from dit_accel.eval.results.types import Results
from dit_accel.eval.view.cells import Cell
from dit_accel.eval.view.definitions import definition
from dit_accel.eval.view.equal_time import Comparison, equal_time
from dit_accel.eval.view.table import Column, Table, build_table, metric_keys

VERDICTS = {
    "better": "better",
    "worse": "worse",
    "undecided": "not decided",
    "few": "too few samples to tell",
    "mixed": "identical pairs have no finite value",
    "overlap": "intervals overlap",
    "open": "no interval",
    "unknown": "not comparable",
}
READING = (
    "Quality: value [95 % interval] Δ difference to the reference. Seconds: median "
    "(quartiles) of measured calls. Bold: best of the column."
)


def markdown(results: Results, title: str | None = None) -> str:
    """The whole file."""
    table = build_table(results)
    lines = [
        f"# {escape(title or results['title'])}",
        "",
        f"Model {escape(results['model'])}, {results['prompts']} prompts, "
        f"measured calls: {results['repeats']}, reference {escape(results['reference'])}"
        f"{_fine(results)}. {READING}",
        "",
        *_table(table),
    ]
    for key in metric_keys(results):
        found = equal_time(results, key, "total")
        if found:
            if "## At equal time" not in lines:
                lines += ["", "## At equal time"]
                lines += ["", "Against dense sampling with fewer steps, by total seconds."]
            lines += ["", f"{escape(definition(key).label)}:", ""]
            lines += [
                f"- {escape(x.name)}: {', '.join(y for y in (_difference(x), VERDICTS[x.verdict]) if y)}"
                f" ({x.basis})"
                for x in found
            ]
    return "\n".join(lines) + "\n"


def _fine(results: Results) -> str:
    fine = results.get("fine")
    return "" if fine is None else f", fine run of {fine['num_inference_steps']} steps"


def _difference(found: Comparison) -> str:
    return " ".join(x for x in (found.difference, escape(found.interval)) if x)


def _table(table: Table) -> list[str]:
    headings = ["method", "steps", *(_heading(column) for column in table.columns)]
    lines = [_row(headings), _row(["---", *["---:"] * (len(headings) - 1)])]
    for line in table.lines:
        head = [escape(line.name), str(line.steps)]
        if line.available:
            cells = [_cell(*pair) for pair in zip(line.cells, table.columns, strict=True)]
        else:
            cells = [f"not available: {escape(line.why)}", *[""] * (len(table.columns) - 1)]
        lines.append(_row([*head, *cells][: len(headings)]))
    return lines


def _heading(column: Column) -> str:
    extra = ", ".join(
        x for x in (column.unit, f"n = {column.n}" if column.n else "", column.note) if x
    )
    return f"{escape(column.label)} {column.arrow}".strip() + (
        f" ({escape(extra)})" if extra else ""
    )


def _cell(cell: Cell, column: Column) -> str:
    if cell.value is None:
        return escape(cell.text)
    parts = [
        f"**{cell.text}**" if cell.best else cell.text,
        cell.range,
        f"Δ {cell.delta}" if cell.delta else "",
        f"n = {cell.n}" if cell.n and not column.n else "",
        cell.note if not column.note and math.isfinite(cell.value) else "",
    ]
    return " ".join(part for part in parts if part)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """One line that Markdown takes as text: names and reasons may hold anything."""
    return re.sub(r"([\\`*_|<\[\]~])", r"\\\1", " ".join(text.split()))
