"""Results on stdout, and the exit code of a --fail-if condition."""

import json
import sys
from typing import Any


def print_line(text: str) -> None:
    """Print a line on stdout."""
    sys.stdout.write(text + "\n")


def print_json(data: Any) -> None:
    """Print `data` as JSON, for programs."""
    print_line(json.dumps(data, indent=2, ensure_ascii=False))


def print_results(found: dict[str, Any], format_: str, *, parts: bool = False) -> None:
    """Print results of evaluations.

    Args:
        found: results by folder.
        format_: "json" or "human".
        parts: also print the seconds of the parts of a call.
    """
    from dit_accel.eval.view.table import results_lines

    if format_ == "json":
        print_json(found if len(found) > 1 else next(iter(found.values())))
        return
    for folder, results in found.items():
        print_line(f"{results['title']} ({folder})")
        print_line("\n".join(results_lines(results, parts=parts)) + "\n")


def fail_on(reasons: list[str], label: str = "fail_if") -> None:
    """Exit with 3 if a --fail-if condition holds, or a bound is exceeded.

    Args:
        reasons: one for each condition that holds.
        label: first word of each line.
    """
    if reasons:
        for reason in reasons:
            sys.stderr.write(f"{label}: {reason}\n")
        raise SystemExit(3)
