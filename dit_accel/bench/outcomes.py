"""Comparison of the outcomes of one set of tests between variants of the tested code.

A record is a dict of `test`, `outcome` ("passed", "failed", "skipped"), `message`, and counts of accelerated calls.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Records = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Allowed:
    """A documented difference: tests, variants, and text in the message of the failure."""

    test: str
    message: str
    variants: str
    reason: str

    def covers(self, test: str, variant: str, message: str) -> bool:
        """Return whether this rule covers a failure."""
        pairs = ((self.test, test), (self.variants, variant), (self.message, message))
        return all(re.search(pattern, text) for pattern, text in pairs)


def read_records(path: Path) -> Records:
    """Return the record of each test by its name, from a file with one JSON record per line."""
    found: Records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name = record.pop("test").removeprefix("tests/pipelines/")
        # A test that passes and then fails in its teardown has failed.
        if name not in found or record["outcome"] == "failed":
            found[name] = record
    return found


def one_line(message: str) -> str:
    """Return the beginning of a failure's message on one line, without paths of temporary folders."""
    return re.sub(r"/\S*pytest-of-[^\s/]+/", "", " ".join(message.split()))[:120]


def compare(
    results: Mapping[str, Records], against: Mapping[str, str], allowed_by: Sequence[Allowed]
) -> dict[str, Any]:
    """Return the outcomes of every test, and the failures that the plain variants do not have.

    Args:
        results: records by variant.
        against: baseline of each variant, by name. A plain variant is its own baseline.
        allowed_by: rules of the documented differences.
    """
    tests = list(dict.fromkeys(name for found in results.values() for name in found))
    unexpected, allowed = [], []
    for variant, found in results.items():
        plain = results[against[variant]]
        for name in tests:
            outcome, before = (
                x.get(name, {"outcome": "not run"})["outcome"] for x in (found, plain)
            )
            if outcome in (before, "passed"):
                continue
            message = found.get(name, {}).get("message", "")
            rule = next((x for x in allowed_by if x.covers(name, variant, message)), None)
            entry = {"test": name, "variant": variant, "plain": before, "outcome": outcome}
            entry["message"] = one_line(message)
            if rule is None:
                unexpected.append(entry)
            else:
                allowed.append(entry | {"reason": rule.reason})
    return {
        "format_version": 1,
        "counts": {x: counts(found.values()) for x, found in results.items()},
        "plain_failures": [
            {"variant": x, "test": name, "message": one_line(record["message"])}
            for x in results
            if against[x] == x
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
    """Return the number of tests with each outcome, and the number of accelerated calls."""
    records = list(records)
    total = Counter(x["outcome"] for x in records)
    found = {x: total[x] for x in ("passed", "failed", "skipped")}
    for name in ("pipelines", "sparse_calls", "ras_steps"):
        found[name] = sum(x.get(name, 0) for x in records)
    found["tests_with_sparse_calls"] = sum(x.get("sparse_calls", 0) > 0 for x in records)
    found["tests_with_ras_steps"] = sum(x.get("ras_steps", 0) > 0 for x in records)
    return found


def markdown(report: dict[str, Any], texts: Mapping[str, str]) -> str:
    """Return the report of `compare` as Markdown, with a description of each variant."""
    lines = [
        "| variant | what runs | passed | failed | skipped | not as plain, allowed | not as plain |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for variant, text in texts.items():
        c = report["counts"][variant]
        more = [sum(x["variant"] == variant for x in report[k]) for k in ("allowed", "unexpected")]
        cells = [variant, text, c["passed"], c["failed"], c["skipped"], *more]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "Passed / failed by file:", "", f"| file | {' | '.join(texts)} |"]
    lines.append("|---" * (1 + len(texts)) + "|")
    files = dict.fromkeys(name.split("::")[0] for name in report["tests"])
    for file in files:
        cells = [file]
        for variant in texts:
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
    for variant in texts:
        c = report["counts"][variant]
        figures = (c["pipelines"], c["tests_with_sparse_calls"], c["tests_with_ras_steps"])
        lines.append(f"- {variant}: {'; '.join(map(str, figures))}")
    lines += ["", "Fails with a variant only, documented (number of tests):", ""]
    groups = Counter(
        (x["variant"], x["test"].split("::")[0], x["reason"]) for x in report["allowed"]
    )
    lines += [f"- {v}, {file}: {why} ({n})" for (v, file, why), n in groups.items()] or ["- none"]
    for key, title in (
        ("plain_failures", "Fails with plain pipelines"),
        ("unexpected", "Fails with a variant only, not documented"),
    ):
        lines += ["", f"{title}:", ""]
        by_test: dict[str, dict[str, str]] = {}
        for x in report[key]:
            by_test.setdefault(x["test"], {})[x["variant"]] = x["message"]
        lines += [
            f"- `{test}` ({', '.join(found)}): {next(iter(found.values()))}"
            for test, found in by_test.items()
        ] or ["- none"]
    return "\n".join(lines) + "\n"
