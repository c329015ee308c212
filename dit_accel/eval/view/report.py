"""A report from results.json and its media: table.md, grid.png and report.html."""

import importlib.util
import os
from pathlib import Path

from dit_accel.eval.results.store import read_results
from dit_accel.eval.view.grid import grid
from dit_accel.eval.view.markdown import markdown
from dit_accel.eval.view.page import render_page
from dit_accel.files import atomic_path, check_writable

TABLE, GRID, PAGE = "table.md", "grid.png", "report.html"


def report(
    folder: str | os.PathLike,
    *,
    title: str | None = None,
    samples: int = 8,
    overwrite: bool = True,
) -> dict[str, Path]:
    """Write the report beside results.json.

    Args:
        folder: holds results.json and the media that it names.
        title: of page and table; None takes that of results.json.
        samples: at most this many go into the page and the grid, >= 0.
        overwrite: whether an older report may be replaced.

    Returns:
        "table", "page" and, where there are media, "grid": the paths.

    Raises:
        ValueError: bad results.json, missing media, `samples` < 0, a report that is there already.
            Nothing is written then.
        ImportError: jinja2 or matplotlib is missing.
    """
    from dit_accel.sampling.media import write_png

    check_libraries()
    if samples < 0:
        raise ValueError(f"samples={samples}: accepted is a whole number >= 0")
    results = read_results(folder)
    folder = check_writable(folder, "folder")
    present = [name for name in (TABLE, GRID, PAGE) if (folder / name).exists()]
    if present and not overwrite:
        raise ValueError(
            f"folder={str(folder)!r}: already holds {present[0]}; move it away or overwrite"
        )
    texts = {
        "table": (folder / TABLE, markdown(results, title)),
        "page": (folder / PAGE, render_page(results, folder, title=title, samples=samples)),
    }
    picture = grid(results, folder, samples)
    written = {}
    for key, (path, text) in texts.items():
        with atomic_path(path) as temporary:
            # Settings may hold what UTF-8 cannot: a lone surrogate from a JSON escape.
            temporary.write_bytes(text.encode("utf-8", errors="replace"))
        written[key] = path
    if picture is not None:
        write_png(folder / GRID, picture)
        written["grid"] = folder / GRID
    else:
        (folder / GRID).unlink(missing_ok=True)  # of an earlier report
    return written


def check_libraries() -> None:
    """Raise ImportError if a report cannot be made here."""
    for library in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            raise ImportError(
                f"a report needs {library}; install it with `pip install 'dit-accel[eval]'`"
            )
