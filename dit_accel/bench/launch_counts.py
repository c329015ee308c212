"""Benchmark of the operations that a sparse attention call starts on a GPU, without a GPU (kernels/count_ops.py)."""

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.bench.launches import BOUNDS, HOST_BOUND_US, MODES, ROUTERS, Shape, count, host_time
from dit_accel.environment import machine, versions
from dit_accel.files import check_file, write_json


@dataclass
class LaunchCounts:
    """Operations that a sparse attention call starts on a GPU, by mode and router."""

    shape: Shape = field(default_factory=Shape)
    output: Path | None = None
    """Results file. Default: print only."""
    host: bool = True
    """Also measure the time of the Python code."""
    check: bool = False
    """Exit with 1 if a bound is missed."""

    def run(self) -> None:
        """Count, print a table, write the results, and print missed bounds.

        Raises:
            SystemExit: `check` is set and a bound is missed; exit status 1.
        """
        if self.output is not None:
            check_file(self.output, "--output")
        rows = [self.row(mode, router) for mode in MODES for router in ROUTERS]
        print("| mode | router | launches | bound | torch operators | Triton | Python, us |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            names = [
                ", ".join(f"{n} {name}" for name, n in row[key].items()) or "-"
                for key in ("torch_ops", "launches")
            ]
            cells = (row["mode"], row["router"], row["total"], row["bound"] or "-", *names)
            print(f"| {' | '.join(map(str, (*cells, row.get('host_us', '-'))))} |")
        if self.output is not None:
            data = {"shape": asdict(self.shape), "rows": rows}
            write_json(self.output, {"versions": versions(), "machine": machine(), **data})
        misses = [f"{x['mode']}, {x['router']}: {what}" for x in rows for what in missed(x)]
        for miss in misses:
            print(f"missed: {miss}", file=sys.stderr)
        if self.check and misses:
            sys.exit(1)

    def row(self, mode: str, router: str) -> dict[str, Any]:
        """Return the counts of one mode and router, and the time of the Python code."""
        call, plan = count(self.shape, mode, router)
        row: dict[str, Any] = {
            "mode": mode,
            "router": router,
            "total": call.total,
            "bound": BOUNDS.get(mode),
            "router_and_plan": plan.total,
            "torch_ops": dict(Counter(call.ops)),
            "launches": dict(Counter(call.launches)),
            "syncs": call.syncs,
        }
        if self.host:
            row["host_us"] = round(host_time(mode, router), 1)
        return row


def missed(row: dict[str, Any]) -> list[str]:
    """Return the bounds that a row misses."""
    found = []
    if row["bound"] is not None and row["total"] > row["bound"]:
        found.append(f"{row['total']} launches, at most {row['bound']}")
    if row["router_and_plan"] > 4:
        found.append(f"{row['router_and_plan']} launches of router and plan, at most 4")
    if row["syncs"]:
        found.append(f"waits for the device: {', '.join(row['syncs'])}")
    if row["mode"] == "none" and row.get("host_us", 0) > HOST_BOUND_US:
        found.append(f"{row['host_us']} us of Python, at most {HOST_BOUND_US}")
    return found
