"""`write_record`: writer of the results file of a benchmark whose options are the fields of a dataclass."""

from pathlib import Path
from typing import Any

from dit_accel.environment import machine, versions
from dit_accel.files import write_json


def write_record(
    path: Path, version: int, options: object, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write rows with the options of the benchmark and a description of the machine; return the written record.

    Args:
        path: JSON file.
        version: version of the format.
        options: options, a dataclass. Its field `output` is left out.
        rows: results.
    """
    record = {
        "format_version": version,
        **{k: x for k, x in vars(options).items() if k != "output"},
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    write_json(path, record)
    return record
