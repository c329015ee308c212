"""Time of `import dit_accel` over the time of `import torch`, each in fresh processes, alternating.

python pipelines/bench_import.py --output pipelines/results/import.json
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from dit_accel.environment import machine, versions
from dit_accel.files import write_json

CODE = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"


@dataclass
class Args:
    """Command line."""

    output: Path | None = None
    repeats: int = 9


def main(args: Args) -> None:
    seconds: dict[str, list[float]] = {"torch": [], "dit_accel": []}
    for _ in range(args.repeats):
        for name, times in seconds.items():
            command = [sys.executable, "-c", CODE.format(name)]
            times.append(
                float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = median["dit_accel"] / median["torch"]
    print(
        f"import torch {median['torch']:.2f} s CPU, import dit_accel {median['dit_accel']:.2f} s, ratio {ratio:.2f}"
    )
    if args.output is not None:
        write_json(
            args.output,
            {
                "format_version": 1,
                "cpu_seconds": seconds,
                "ratio": ratio,
                "versions": versions(),
                "machine": machine(),
            },
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
