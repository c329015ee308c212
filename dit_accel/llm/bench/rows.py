"""`run_rows`: computes the rows of a benchmark table, and saves each in a results file from which a run can resume."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel.files import write_json


def run_rows(
    header: Mapping[str, Any],
    key: str,
    wanted: Mapping[str, Any],
    measure_row: Callable[[str], Mapping[str, Any]],
    *,
    prepare: Callable[[], Any],
    output: Path | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Compute missing rows and return the results: the header and all rows, the wanted rows first.

    An existing row is computed again only if its settings differ or it has an error.

    Args:
        header: results without rows.
        key: key of the settings in a row.
        wanted: settings of each row by its name, as plain values or None.
        measure_row: function that computes the row with a name. If it raises ValueError, the row records the error.
        prepare: called before a row is computed. Its errors end the run.
        output: JSON file, written after each row. Default: no file.
        rows: existing rows.
        on_row: called with each new row.
    """
    kept = {row["name"]: row for row in rows or []}
    made: dict[str, dict[str, Any]] = {}

    def results() -> dict[str, Any]:
        """Return the header and the rows so far: rows in the order of `wanted`, then other rows of earlier runs."""
        there = {**kept, **made}
        names = [*(x for x in wanted if x in there), *(x for x in there if x not in wanted)]
        return {**header, "rows": [there[x] for x in names]}

    for name, given in wanted.items():
        settings = json.loads(json.dumps(given))
        old = kept.get(name)
        if old is not None and "error" not in old and old[key] == settings:
            continue
        prepare()
        start = time.perf_counter()
        row: dict[str, Any] = {"name": name, key: settings}
        try:
            row.update(measure_row(name))
        except ValueError as error:  # such as settings that do not fit the model
            row["error"] = str(error)
        row["seconds"] = round(time.perf_counter() - start, 2)
        made[name] = json.loads(json.dumps(row))
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, results())
        if on_row is not None:
            on_row(row)
    return results()
