"""`table_lines`: Markdown tables of the results of `run_kv_bench`."""

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the tables: first a table of the texts, then a table for each task."""
    rows = [row for row in results["rows"] if "error" not in row]
    lines = [*_texts(rows), *(x for task in _tasks(rows) for x in _task(rows, task))]
    return lines + [f"{row['name']}: {row['error']}" for row in results["rows"] if "error" in row]


def _texts(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(rows[0]["texts"]) if rows else []
    if not names:
        return
    heads = [f"ppl % {x}" for x in names] + [f"KL {x}" for x in names] + ["top-1", "bytes", "read"]
    yield from _head(["cache", *heads])
    for row in rows:
        found = [row["texts"][x] for x in names]
        cells = [f"{x['perplexity_percent']:+.2f}" for x in found]
        cells += [f"{x['kl']:.4f}" for x in found]
        cells += [
            f"{mean(x['top1'] for x in found):.3f}",
            f"{mean(x['bytes_share'] for x in found):.3f}",
        ]
        shares = [x["read_share"] for x in found if x["read_share"] is not None]
        yield _line([row["name"], *cells, f"{mean(shares):.3f}" if shares else ""])


def _tasks(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row["tasks"]))


def _task(rows: list[dict[str, Any]], task: str) -> Iterator[str]:
    """Yield the table of a task: share of right answers by turn in each mode, then times, bytes and read share."""
    first = next(row["tasks"][task] for row in rows if task in row["tasks"])
    modes = list(first)
    yield from ["", f"{task}: share of right answers, by turn", ""]
    yield from _head(["cache", *modes, "first token, s", "token, ms", "MB", "read"])
    for row in rows:
        if task not in row["tasks"]:
            yield _line([row["name"], *[""] * (len(modes) + 4)])
            continue
        cells = [_by_turn(row["tasks"][task][mode]) for mode in modes]
        # The first turn of a conversation reads the context.
        turns = [x for mode in modes for session in row["tasks"][task][mode] for x in session]
        later = [
            x
            for mode in modes
            for session in row["tasks"][task][mode]
            for x in (
                session if mode == "multi_request" else session[1:] if mode == "multi_turn" else []
            )
        ]
        shares = [x["read_share"] for x in turns if x["read_share"] is not None]
        cells.append(f"{mean(x['first_token_seconds'] for x in later):.3f}" if later else "")
        cells.append(f"{1000 * mean(x['token_seconds'] for x in turns):.1f}")
        cells.append(f"{mean(x['cache_bytes'] for x in turns) / 1e6:.2f}")
        yield _line([row["name"], *cells, f"{mean(shares):.3f}" if shares else ""])


def _by_turn(sessions: list[list[dict[str, Any]]]) -> str:
    turns = max(len(x) for x in sessions)
    shares = [mean(x[i]["right"] for x in sessions if i < len(x)) for i in range(turns)]
    if len(set(shares)) == 1:
        return f"{shares[0]:.2f}"
    return " ".join(f"{x:.2f}" for x in shares)


def _head(cells: list[str]) -> Iterator[str]:
    yield _line(cells)
    yield _line(["---"] * len(cells)).replace(" ", "")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
