"""Benchmark of the time of `import dit_accel` (pipelines/bench_import.py)."""

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dit_accel.environment import machine, versions
from dit_accel.files import write_json

CODE = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"


@dataclass
class ImportTime:
    """CPU time of `import dit_accel` and of `import torch`, in fresh processes and in turns."""

    output: Path | None = None
    """Results file. Default: print only."""
    repeats: int = 9
    """Number of processes of each kind."""

    def run(self) -> None:
        """Measure, print the medians, and write all times to `output`."""
        seconds: dict[str, list[float]] = {"torch": [], "dit_accel": []}
        for _ in range(self.repeats):
            for name, times in seconds.items():
                command = [sys.executable, "-c", CODE.format(name)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                times.append(float(done.stdout))
        median = {name: statistics.median(times) for name, times in seconds.items()}
        ratio = median["dit_accel"] / median["torch"]
        print(
            f"import torch {median['torch']:.2f} s CPU, import dit_accel {median['dit_accel']:.2f} s, ratio {ratio:.2f}"
        )
        if self.output is not None:
            record = {"format_version": 1, "cpu_seconds": seconds, "ratio": ratio}
            write_json(self.output, record | {"versions": versions(), "machine": machine()})
