"""`table_lines`: text table of the results of `run_bench`."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADS = {
    "key_value": "keys",
    "multi_needle": "needles",
    "variable_tracing": "variables",
    "middle": "middle",
    "video_needle": "video",
}
"""Column headings of the tasks in `retrieval`."""
FIGURES = {**HEADS, "density": "density"}
"""Column headings of all retrieval results at a prompt length."""


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table: one line per row, followed by notes."""
    rows = results["rows"]
    texts = list(results["texts"])
    lengths = [str(x) for x in results["settings"]["retrieval_lengths"]]
    head = ["pattern", "density", *(f"ppl % {x}" for x in texts), *(f"KL {x}" for x in texts)]
    head += ["top-1", "passkeys", *(f"{x} {n}" for n in lengths for x in FIGURES.values())]
    cells = [head, *(_cells(row, texts, lengths) for row in rows)]
    kept = [i for i in range(len(head)) if any(line[i] for line in cells[1:])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(line[i].ljust(widths[i]) for i in kept).rstrip() for line in cells]
    dense = next((row for row in rows if row["prefill"] is None and "error" not in row), None)
    if dense is not None and texts:
        shown = ", ".join(f"{x} {dense['texts'][x]['perplexity']:.2f}" for x in texts)
        lines.append(f"dense perplexity: {shown}")
    lines += [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    return lines


def _cells(row: Mapping[str, Any], texts: Sequence[str], lengths: Sequence[str]) -> list[str]:
    if "error" in row:
        return [row["name"], "failed", *[""] * (2 * len(texts) + 2 + len(FIGURES) * len(lengths))]
    found = [row["texts"][x] for x in texts]
    cells = [row["name"], "" if row["density"] is None else f"{row['density']:.3f}"]
    if row["prefill"] is None or not texts:
        cells += [""] * (2 * len(texts) + 1)
    else:
        cells += [f"{x['perplexity_percent']:+.2f}" for x in found]
        cells += [f"{x['kl']:.4f}" for x in found]
        cells.append(f"{sum(x['top1'] for x in found) / len(found):.3f}")
    score, shares = row["passkeys"], row["retrieval"] or {}
    cells.append("" if score is None else f"{score['exact']}/{score['prompts']}")
    at = [shares.get(n, {}).get(x) for n in lengths for x in FIGURES]
    return cells + ["" if x is None else f"{x:.2f}" for x in at]
