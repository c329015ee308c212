"""Prints how much memory published models need under region-adaptive sampling, without weights or a GPU.

python pipelines/memory_table.py --output pipelines/results/memory.json
"""

from pathlib import Path

import tyro

from dit_accel.bench.memory_table import rows, table
from dit_accel.files import write_json


def main(output: Path | None = None) -> None:
    """Estimate and print a Markdown table.

    Args:
        output: JSON file for the bytes.
    """
    measured = rows()
    if output:
        write_json(output, {"format_version": 1, "dtype": "bfloat16", "rows": measured})
    print(table(measured))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
