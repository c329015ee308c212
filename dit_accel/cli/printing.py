"""Output of results on stdout, and the exit code of --fail-if conditions."""

import json
import sys
from typing import Any


def print_line(text: str) -> None:
    """Print a line to stdout."""
    sys.stdout.write(text + "\n")


def print_json(data: Any) -> None:
    """Print `data` to stdout as JSON."""
    print_line(json.dumps(data, indent=2, ensure_ascii=False))


def print_results(found: dict[str, Any], format_: str, *, parts: bool = False) -> None:
    """Print results of evaluations.

    Args:
        found: results of each folder.
        format_: "json" or "human".
        parts: also print the seconds of the parts of a call.
    """
    from dit_accel.eval.view.table import results_text

    if format_ == "json":
        print_json(found if len(found) > 1 else next(iter(found.values())))
        return
    for folder, results in found.items():
        print_line(f"{results['title']} ({folder})")
        print_line(results_text(results, parts=parts) + "\n")


def fail_on(reasons: list[str], label: str = "fail_if") -> None:
    """Exit with code 3 if there are reasons, and print them to stderr.

    Args:
        reasons: one line for each condition that holds or bound that is exceeded.
        label: prefix of each line.
    """
    if reasons:
        for reason in reasons:
            sys.stderr.write(f"{label}: {reason}\n")
        raise SystemExit(3)
