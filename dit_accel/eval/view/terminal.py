"""Results and figures as lines for a terminal."""

from collections.abc import Mapping

from dit_accel.eval.results.types import MetricValue, Results
from dit_accel.eval.view.cells import figure_cell
from dit_accel.eval.view.definitions import definition
from dit_accel.eval.view.table import build_table


def results_lines(results: Results, *, parts: bool = False) -> list[str]:
    """The table, without what only the page has room for.

    Args:
        parts: also the parts of a call.
    """
    table = build_table(results)
    shown = [
        i
        for i, column in enumerate(table.columns)
        if (parts or column.group != "Parts of a call") and not column.key.startswith("judge_")
    ]
    heads = [f"{x.label} {x.unit}".strip() for x in (table.columns[i] for i in shown)]
    rows = [["", "steps", *heads]]
    for line in table.lines:
        cells = [line.cells[i].text for i in shown] if line.available else [line.why]
        rows.append([line.name, str(line.steps), *cells])
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    out = []
    for first, *others in rows:
        if len(others) == len(widths) - 1:
            others = [x.rjust(n) for x, n in zip(others, widths[1:], strict=True)]
        out.append("  ".join([first.ljust(widths[0]), *others]).rstrip())
    return out


def figures_lines(figures: Mapping[str, MetricValue]) -> list[str]:
    """A figure a line, with its interval, size and network."""
    out, width = [], max(map(len, figures), default=0) + 2
    for metric, figure in figures.items():
        cell = figure_cell(figure, definition(metric))
        notes = [f"n = {cell.n}"]
        if "n_reference" in figure:
            notes[0] += f" against {figure['n_reference']}"
        if figure["extractor"] is not None:
            notes.append(figure["extractor"]["id"])
            if resize := figure["extractor"].get("resize"):
                notes.append(f"resize {resize}")
        notes += [cell.note] if cell.note else []
        text = " ".join(x for x in (cell.text, figure["unit"], cell.range) if x)
        out.append(f"{metric:{width}}{text}  ({', '.join(notes)})")
    return out
