"""Counts what a sparse attention call starts on a GPU, and times the Python around its kernels; needs no GPU.

python kernels/count_ops.py
python kernels/count_ops.py --check

Between q, k, v and the output at inference, router and plan included: torch operators that run something, Triton
launches by name, and waits for the device. Tensors have no memory ("meta"), so nothing is computed. The time of the
Python is measured on small CPU tensors with the kernels left out; it depends on this machine.
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from dit_accel.bench.launches import BOUNDS, HOST_BOUND_US, MODES, ROUTERS, Shape, count, host_time
from dit_accel.environment import machine, versions
from dit_accel.files import check_file, write_json


@dataclass
class Args:
    """Command line."""

    shape: Shape = field(default_factory=Shape)
    output: Path = Path(__file__).parent / "results" / "launches.json"
    host: bool = True
    """Also measure the time of the Python code."""
    check: bool = False
    """Exit with 1 if a bound is missed."""


def measured(args: Args, mode: str, router: str) -> dict[str, Any]:
    call, plan = count(args.shape, mode, router)
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
    if args.host:
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


def main(args: Args) -> None:
    check_file(args.output, "--output")
    rows = [measured(args, mode, router) for mode in MODES for router in ROUTERS]
    print("| mode | router | launches | bound | torch operators | Triton | Python, us |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        names = [
            ", ".join(f"{n} {name}" for name, n in row[key].items()) or "-"
            for key in ("torch_ops", "launches")
        ]
        cells = (row["mode"], row["router"], row["total"], row["bound"] or "-", *names)
        print(f"| {' | '.join(map(str, (*cells, row.get('host_us', '-'))))} |")
    data = {"versions": versions(), "machine": machine(), "shape": asdict(args.shape), "rows": rows}
    write_json(args.output, data)
    misses = [f"{x['mode']}, {x['router']}: {what}" for x in rows for what in missed(x)]
    for miss in misses:
        print(f"missed: {miss}", file=sys.stderr)
    if args.check and misses:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
