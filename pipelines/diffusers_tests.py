"""Runs diffusers' own pipeline tests on plain, on our and on enabled pipelines, and compares.

    python pipelines/diffusers_tests.py --diffusers ../diffusers --output pipelines/results/diffusers_tests.json
    python pipelines/diffusers_tests.py --diffusers diffusers.git --revision v0.40.0 --variants plain enable

A copy of the tests folder runs once for each variant, offline; tiny text encoders and tokenizers take the place of
those that the tests fetch from the hub. Exit code 1: a test passes with the plain pipelines and fails with a variant,
and no rule of ALLOWED names it. diffusers_tests_plugin.py holds the variants.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from diffusers_tests_plugin import VARIANTS

from dit_accel.environment import machine, versions
from dit_accel.files import atomic_path, write_json

FOLDERS = ("wan", "stable_diffusion_3", "lumina", "lumina2")
LARGE_LEFT_OUT = (
    "wan/test_wan_22.py",
    "wan/test_wan_22_image_to_video.py",
)  # refused by name, see ALLOWED
LEFT_OUT = {
    "wan/test_wan_animate.py": "WanAnimateTransformer3DModel is not supported",
    "wan/test_wan_vace.py": "WanVACETransformer3DModel is not supported",
}
# Imported by modules of which the tests here use only helpers.
STAND_INS = {
    "parameterized": "class parameterized:\n    expand = staticmethod(lambda *a, **k: lambda f: f)\n",
    "requests_mock": "",
}


@dataclass(frozen=True)
class Allowed:
    """A documented difference: which tests of which variants, and what their message says."""

    test: str
    message: str
    variants: str
    reason: str

    def covers(self, test: str, variant: str, message: str) -> bool:
        """Whether this rule names the failure."""
        pairs = ((self.test, test), (self.variants, variant), (self.message, message))
        return all(re.search(pattern, text) for pattern, text in pairs)


ALLOWED = (
    Allowed("test_fused_qkv", "after enable", "enable|sparse", "fusing after enable is refused"),
    Allowed("test_wan_22", r"transformer_2|Wan2\.2", "", "Wan2.2 is refused by name"),
    Allowed(
        "test_wan_22.*incorrect_variants",
        "AssertionError",
        "classes",
        "Wan2.2 is refused before its files are read",
    ),
    Allowed(
        "lumina2.*batch_single_identical",
        "",
        "sparse",
        "prompts of different lengths: masked calls of Lumina2 run dense",
    ),
)


@dataclass
class DiffusersTests:
    """Compare the outcome of diffusers' pipeline tests between variants."""

    diffusers: Path
    """A git repository of diffusers: a checkout, or a bare one."""
    revision: str | None = None
    """Commit or tag whose tests are taken. Default: HEAD."""
    output: Path | None = None
    """JSON file; the same as Markdown is written beside it. Default: only printed."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which variants run, beside those with plain pipelines that they are compared with."""
    tests: str = ""
    """Only the tests that this expression of pytest's -k selects."""
    work: Path | None = None
    """Folder that keeps the records of finished variants, so that a stopped run goes on. Default: none is kept."""

    def run(self) -> int:
        """Run, print and write; the exit code."""
        unknown = set(self.variants) - set(VARIANTS)
        if unknown:
            raise SystemExit(f"--variants {', '.join(unknown)}: accepted are {', '.join(VARIANTS)}")
        asked = {x: VARIANTS[x].against for x in self.variants}
        variants = [x for x in VARIANTS if x in asked or x in asked.values()]
        with tempfile.TemporaryDirectory(prefix="diffusers-tests-") as folder:
            revision = take_tests(self.diffusers, self.revision, Path(folder))
            results = {x: self.records(Path(folder), x) for x in variants}
        report = compare(results) | {"diffusers_tests": revision}
        report |= {"versions": versions(), "machine": machine()}
        text = markdown(report)
        print(text)
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.output, report)
            with atomic_path(self.output.with_suffix(".md")) as path:
                path.write_text(text, encoding="utf-8")
        return 1 if report["unexpected"] else 0

    def records(self, folder: Path, variant: str) -> dict[str, dict[str, Any]]:
        """Return the record of each test, read from the work folder or run now."""
        kept = None if self.work is None else self.work / f"{variant}.jsonl"
        if kept is None or not kept.exists():
            found = run_variant(folder, variant, self.tests)
            if kept is None:
                return read_records(found)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(kept) as path:
                path.write_bytes(found.read_bytes())
        return read_records(kept)


def take_tests(source: Path, revision: str | None, folder: Path) -> str:
    """Copy the tests folder and what it needs; return the commit that it is from."""
    git = ["git", "-C", str(source)]

    def call(*arguments: str) -> bytes:
        return subprocess.run([*git, *arguments], check=True, capture_output=True).stdout

    if not source.is_dir():
        raise SystemExit(
            f"--diffusers {source}: no such folder; accepted is a diffusers repository"
        )
    try:
        commit = call("rev-parse", "--verify", f"{revision or 'HEAD'}^{{commit}}").decode().strip()
        archive = call("archive", "--format=tar", commit, "tests")
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"--diffusers {source}, --revision {revision}: {error.stderr.decode().strip()}; accepted is a git "
            "repository of diffusers with a tests folder at that commit"
        ) from None
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    plugin = Path(__file__).with_name("diffusers_tests_plugin.py")
    (folder / plugin.name).write_text(plugin.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "stand_ins").mkdir()
    for name, text in STAND_INS.items():
        (folder / "stand_ins" / f"{name}.py").write_text(text)
    return commit


def run_variant(folder: Path, variant: str, expression: str) -> Path:
    """Run the tests once and return the file with a JSON record per line."""
    records = folder / f"{variant}.jsonl"
    path = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "DIT_ACCEL_VARIANT": variant,
        "DIT_ACCEL_REPORT": str(records),
        "DIT_ACCEL_STAND_INS": str(folder / "stand_ins"),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # slices are compared with figures of a CPU
    }
    environment.pop("RUN_SLOW", None)
    environment.pop("RUN_NIGHTLY", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "diffusers_tests_plugin",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-q", "--no-header", "--tb=short", "--rootdir", str(folder), "-k", expression]
    left_out = [*LEFT_OUT, *(LARGE_LEFT_OUT if VARIANTS[variant].large else ())]
    command += [f"--ignore=tests/pipelines/{name}" for name in left_out]
    command += [f"tests/pipelines/{name}" for name in FOLDERS]
    print(f"{variant}: {VARIANTS[variant].text}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{variant}: pytest ended with {done.returncode}, see above")
    return records


def read_records(records: Path) -> dict[str, dict[str, Any]]:
    """Return the record of each test by its name."""
    found: dict[str, dict[str, Any]] = {}
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name = record.pop("test").removeprefix("tests/pipelines/")
        # A test that passes and fails while it is taken down has failed.
        if name not in found or record["outcome"] == "failed":
            found[name] = record
    return found


def first_line(message: str) -> str:
    """The line of a failure's message that says most."""
    lines = [x.strip() for x in message.splitlines() if x.strip()]
    return lines[0][:300] if lines else ""


def compare(results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Outcomes of every test, and the failures that the plain pipelines do not have."""
    tests = list(dict.fromkeys(name for found in results.values() for name in found))
    unexpected, allowed = [], []
    for variant, found in results.items():
        plain = results[VARIANTS[variant].against]
        for name in tests:
            outcome, before = (
                x.get(name, {"outcome": "not run"})["outcome"] for x in (found, plain)
            )
            if outcome in (before, "passed"):
                continue
            message = found.get(name, {}).get("message", "")
            rule = next((x for x in ALLOWED if x.covers(name, variant, message)), None)
            entry = {"test": name, "variant": variant, "plain": before, "outcome": outcome}
            entry["message"] = first_line(message)
            if rule is None:
                unexpected.append(entry)
            else:
                allowed.append(entry | {"reason": rule.reason})
    return {
        "format_version": 1,
        "variants": {x: VARIANTS[x].text for x in results},
        "left_out": LEFT_OUT,
        "counts": {x: counts(found.values()) for x, found in results.items()},
        "plain_failures": [
            {"variant": x, "test": name, "message": first_line(record["message"])}
            for x in results
            if VARIANTS[x].against == x
            for name, record in results[x].items()
            if record["outcome"] == "failed"
        ],
        "unexpected": unexpected,
        "allowed": allowed,
        "tests": {
            name: {x: found.get(name, {}).get("outcome") for x, found in results.items()}
            for name in tests
        },
    }


def counts(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Outcomes, and what was accelerated."""
    records = list(records)
    total = Counter(x["outcome"] for x in records)
    found = {x: total[x] for x in ("passed", "failed", "skipped")}
    for name in ("pipelines", "sparse_calls", "ras_steps"):
        found[name] = sum(x.get(name, 0) for x in records)
    found["tests_with_sparse_calls"] = sum(x.get("sparse_calls", 0) > 0 for x in records)
    found["tests_with_ras_steps"] = sum(x.get("ras_steps", 0) > 0 for x in records)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: counts, outcomes by file, and each difference."""
    lines = [
        "| variant | what runs | passed | failed | skipped | not as plain, allowed | not as plain |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for variant, text in report["variants"].items():
        c = report["counts"][variant]
        more = [sum(x["variant"] == variant for x in report[k]) for k in ("allowed", "unexpected")]
        cells = [variant, text, c["passed"], c["failed"], c["skipped"], *more]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "Passed / failed by file:", "", f"| file | {' | '.join(report['variants'])} |"]
    lines.append("|---" * (1 + len(report["variants"])) + "|")
    files = dict.fromkeys(name.split("::")[0] for name in report["tests"])
    for file in files:
        cells = [file]
        for variant in report["variants"]:
            total = Counter(
                x[variant] for name, x in report["tests"].items() if name.split("::")[0] == file
            )
            cells.append(f"{total['passed']} / {total['failed']}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Accelerated (pipelines enabled; tests with sparse calls; tests with RAS steps):",
        "",
    ]
    for variant in report["variants"]:
        c = report["counts"][variant]
        figures = (c["pipelines"], c["tests_with_sparse_calls"], c["tests_with_ras_steps"])
        lines.append(f"- {variant}: {'; '.join(map(str, figures))}")
    for key, title in (
        ("plain_failures", "Fails with plain pipelines"),
        ("allowed", "Fails with a variant only, documented"),
        ("unexpected", "Fails with a variant only, not documented"),
    ):
        lines += ["", f"{title}:", ""]
        by_reason: dict[tuple[str, str], list[str]] = {}
        for x in report[key]:
            by_reason.setdefault((x.get("reason") or x["message"], x["test"]), []).append(
                x["variant"]
            )
        lines += [
            f"- `{test}` ({', '.join(v)}): {why}" for (why, test), v in by_reason.items()
        ] or ["- none"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(tyro.cli(DiffusersTests, description=__doc__).run())
