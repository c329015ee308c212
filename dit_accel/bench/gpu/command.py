"""Command `kernels/gpu_check.py`: arguments, measuring process, dry run and exit status."""

import argparse
import hashlib
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dit_accel.bench.gpu import compiling, report
from dit_accel.bench.gpu.bounds import verdicts
from dit_accel.bench.gpu.device import Device, DeviceLostError, DryDevice
from dit_accel.bench.gpu.journal import Journal, ResumeError, read
from dit_accel.bench.gpu.recording import without_device
from dit_accel.bench.gpu.runner import Stopped, run_all, stops_on_signal
from dit_accel.bench.gpu.steps import COMPILATIONS, sub_steps
from dit_accel.bench.gpu.supervisor import DEVICE_LOST, STOPPED, supervise
from dit_accel.bench.timing import gpu_clocks
from dit_accel.environment import machine, versions
from dit_accel.files import atomic_path, check_writable
from dit_accel.kernels.block_sparse.tiles import Target

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("dit_accel/kernels", "dit_accel/bench/gpu")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder for gpu_check.json and gpu_check.md; created if needed")
    add("--budget", type=float, default=480.0, help="seconds in all (default: %(default)s)")
    add("--resume", action="store_true", help="resume the run in --out")
    add("--only", default="", help="run sub-steps whose id contains this")
    add("--list", action="store_true", help="print the sub-steps and stop")
    add("--dry", action="store_true", help="without a GPU: compile every launch ahead of time")
    add(
        "--arch", default="90", help='with --dry: "90", "100", "gfx942", ... (default: %(default)s)'
    )
    add(
        "--dry-limit", type=int, help="with --dry: compile at most this many kernels (default: all)"
    )
    add(
        "--workers",
        type=int,
        help="with --dry: compiling processes (default: cores - 1, at most 14)",
    )
    add("--restarted", action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)  # set for the measuring process
    args = parser.parse_args(arguments)
    if not args.dry and not args.list and args.out is None:
        parser.error("--out: missing; accepted is a folder for the results")
    if not 0 < args.budget < math.inf:
        parser.error(f"--budget={args.budget}: accepted is a number of seconds above 0")
    for name in ("dry_limit", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option}={getattr(args, name)}: accepted is an int >= 1")
    if args.dry and args.resume:
        parser.error("--resume: accepted without --dry, which measures nothing")
    if not any(args.only in x.id for x in sub_steps(lambda: math.inf)):
        parser.error(f"--only={args.only}: accepted is a part of an id in the output of --list")
    return args


def source_hash() -> str:
    """Return a hash of the source of the kernels and of the measurements."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return device, source, versions and machine of a run."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    gpu = not args.dry
    return {
        "dry": args.dry,
        "device": torch.cuda.get_device_name() if gpu else "none",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else args.arch,
        "source": source_hash(),
        "commit": commit or None,
        "versions": versions(),
        "machine": machine(),
        "budget_s": args.budget,
    }


def finish(journal: Journal) -> int:
    """Write bounds and summary, and return the exit status."""
    journal.data["bounds"] = verdicts(journal.results())
    journal.save()
    with atomic_path(journal.path.with_suffix(".md")) as path:
        path.write_text(report.markdown(journal.data), encoding="utf-8")
    entries = journal.data["steps"].values()
    bad = [x for x in entries if x["status"] in ("failed", "crashed")]
    wrong = [x for x in entries if x["status"] == "done" and x["result"].get("passed") is False]
    return 1 if bad or wrong else 0


def measure(args: argparse.Namespace) -> int:
    """Run all unfinished sub-steps in this process, and return the exit status."""
    try:
        journal = Journal(args.out / "gpu_check.json", facts(args), resume=args.resume)
    except ResumeError as error:
        say(str(error))
        return 2
    if not args.restarted:  # Triton's cache may be empty, for example on another machine
        for name in COMPILATIONS:
            journal.data["steps"].pop(name, None)

    def left() -> float:
        return args.until - time.time()

    wanted = [x for x in sub_steps(left) if args.only in x.id]
    try:
        with stops_on_signal():
            run_all(wanted, Device(), journal, left=left, say=say)
    except DeviceLostError:
        return DEVICE_LOST
    except Stopped as stopped:
        finish(journal)
        say(f"stopped ({stopped}); resume with --resume")
        return STOPPED
    journal.data.setdefault("clocks", []).append({"before": "end", **(gpu_clocks() or {})})
    status = finish(journal)
    say(report.markdown(journal.data))
    return status


def check_dry(args: argparse.Namespace) -> int:
    """Record the launches of every step without a device, then compile them ahead of time; return the exit status."""
    if args.out is not None and (args.out / "gpu_check.json").exists():
        try:
            kept = read(args.out / "gpu_check.json").get("dry") is not True
        except ResumeError:
            kept = True
        if kept:
            say(
                f"--out={args.out}: its gpu_check.json has measurements, which would be lost; accepted is another folder"
            )
            return 2
    target = Target("hip" if args.arch.startswith("gfx") else "cuda", args.arch)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(args.out or folder) / "gpu_check.json", facts(args))
        wanted = [x for x in sub_steps(lambda: math.inf) if args.only in x.id]
        tried: dict[str, Any] = {"left": lambda: math.inf, "say": lambda line: None}
        with without_device(target) as held:
            run_all([x for x in wanted if x.step != "tiles"], DryDevice(), journal, **tried)
            needed = {x.sketch().key() for x in held}
            run_all(wanted, DryDevice(), journal, **tried)
        status = finish(journal)
        failed = {n: x for n, x in journal.data["steps"].items() if x["status"] != "done"}
    for name, entry in failed.items():
        say(f"{name}: {entry['status']}: {entry.get('error')} {entry.get('where')}")
    sketches = compiling.unique(x.sketch() for x in held)
    chosen = compiling.spread(sketches, args.dry_limit)
    say(
        f"{len(wanted)} sub-steps walked in {time.monotonic() - start:.0f} s, {len(held)} launches, "
        f"{len(sketches)} kernels, {len(chosen)} to compile for {args.arch}"
    )
    result = compiling.compile_all(chosen, target, here=False, workers=args.workers)
    bad = result.get("not_compiled", {})
    # Tiles of the step "tiles" are only tried; not all of them compile.
    wrong = {compiling.label(x) for x in chosen if x.key() in needed} & bad.keys()
    for name, error in bad.items():
        say(f"{name}: {error}{'' if name in wrong else ' (only tried by the step tiles)'}")
    say(f"{result['compiled']} of {len(chosen)} compiled in {result['compile_s']:.0f} s")
    return 1 if status or failed or wrong else 0


def main(args: argparse.Namespace, script: str) -> int:
    """Run the command and return its exit status.

    Args:
        args: result of `parse`.
        script: path of the script, which measuring processes run too.
    """
    if args.list:
        for sub_step in sub_steps(lambda: math.inf):
            if args.only in sub_step.id:
                say(f"{sub_step.id}  (about {sub_step.seconds:.0f} s + {sub_step.flops:.2g} FLOP)")
        return 0
    out: Path | None = None
    if args.out is not None:
        args.out = out = check_writable(args.out, "--out")
    if args.dry:
        return check_dry(args)
    if args.until is not None:
        return measure(args)
    if not torch.cuda.is_available():
        say("no CUDA device; accepted without one are --dry and --list")
        return 2
    assert out is not None, "--out: checked in parse"
    until = time.time() + args.budget
    options = ["--out", str(out), "--budget", str(args.budget), "--only", args.only]
    options += ["--until", str(until)]

    def command(restarted: bool) -> list[str]:
        more = ["--resume"] if args.resume or restarted else []
        more += ["--restarted"] if restarted else []
        return [sys.executable, script, *options, *more]

    return supervise(command, out / "gpu_check.json", say=say)
