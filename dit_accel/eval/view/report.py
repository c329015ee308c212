"""`report`: table.md, report.html and grid.png from a results.json and its media."""

import base64
import hashlib
import importlib.util
import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

from dit_accel.eval.results.store import read_results
from dit_accel.eval.results.types import FORMAT_VERSION, MEDIA, Results
from dit_accel.eval.view.cells import metric_notes, sample_size
from dit_accel.eval.view.definitions import definition
from dit_accel.eval.view.equal_time import VERDICTS, equal_time
from dit_accel.eval.view.grid import grid
from dit_accel.eval.view.plot import plot_svg, plotted_rows
from dit_accel.eval.view.table import READING, build_table, markdown, metric_keys
from dit_accel.files import atomic_path, check_writable

TABLE, GRID, PAGE = "table.md", "grid.png", "report.html"
TEMPLATES = Path(__file__).parent / "templates"
PAGE_BYTES = 64 * 2**20
"""Most bytes of media in a page, before base64 adds a third. Browsers and mail programs still open such a page."""


def report(
    folder: str | os.PathLike, *, title: str | None = None, samples: int = 8
) -> dict[str, Path]:
    """Write the report beside results.json; an earlier report is replaced.

    Args:
        folder: folder with results.json and the media that it names.
        title: title of page and table. Default: that of results.json.
        samples: number of samples in the page and the grid, >= 0.

    Returns:
        Paths by "table", "page" and, if there are media, "grid".

    Raises:
        ValueError: bad results.json, missing media, or `samples` < 0. Nothing is written then.
        ImportError: jinja2 or matplotlib is missing.
    """
    check_libraries()
    if samples < 0:
        raise ValueError(f"samples={samples}: must be an int >= 0")
    results = read_results(folder)
    folder = check_writable(folder, "folder")
    written = {"table": folder / TABLE, "page": folder / PAGE}
    texts = markdown(results, title), render_page(results, folder, title=title, samples=samples)
    picture = grid(results, folder, samples)
    for path, text in zip(written.values(), texts, strict=True):
        with atomic_path(path) as temporary:
            # Settings may hold a lone surrogate from a JSON escape, which UTF-8 cannot encode.
            temporary.write_bytes(text.encode("utf-8", errors="replace"))
    if picture is None:
        (folder / GRID).unlink(missing_ok=True)  # from an earlier report
    else:
        written["grid"] = folder / GRID
        with atomic_path(folder / GRID) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that the font lacks
            picture.savefig(temporary)
    return written


def check_libraries() -> None:
    """Raise ImportError if a library that reports need is missing."""
    for library in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            raise ImportError(
                f"a report needs {library}; install it with `pip install 'dit-accel[eval]'`"
            )


def render_page(
    results: Results, folder: Path, *, title: str | None = None, samples: int = 8
) -> str:
    """Return the page: one HTML file that needs no network and works from the disk; arguments as in `report`."""
    import jinja2

    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # prompts and names can be anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pretty"] = lambda data: json.dumps(data, indent=2, ensure_ascii=False)
    table, metrics = build_table(results), metric_keys(results)
    shown, note = page_samples(results, folder, samples)
    views = [
        {
            "metric": metric,
            "phase": phase,
            "picture": f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}",
            "rows": plotted_rows(results, metric, phase),
            "comparisons": equal_time(results, metric, phase),
        }
        for metric, phase in itertools.product(metrics, ("total", "denoise"))
        if (svg := plot_svg(results, metric, phase)) is not None
    ]
    used = {name for sample in shown for name in sample["media"]}
    player_rows = [
        {"name": x["name"], "method": x["method"], "note": f"{x['num_inference_steps']} steps"}
        for x in results["rows"]
        if x["name"] in used
    ]
    return environment.get_template("page.html.j2").render(
        title=title or results["title"],
        results=results,
        table=table,
        reading=READING,
        views=views,
        labels={key: definition(key).label for key in metrics},
        plotted=list(dict.fromkeys(view["metric"] for view in views)),
        phases=list(dict.fromkeys(view["phase"] for view in views)),
        verdicts=VERDICTS,
        definitions={x.about.text: x.label for x in reversed(table.columns)},
        sources=_sources(results, metrics),
        media_note=note,
        player={"rows": player_rows, "samples": shown, "fps": _fps(folder, results)},
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        format_version=FORMAT_VERSION,
    )


def page_samples(
    results: Results, folder: Path, samples: int, *, page_bytes: int = PAGE_BYTES
) -> tuple[list[dict[str, Any]], str]:
    """Return the first samples whose media fit into `page_bytes`, and a note about the others."""
    present = [sample for sample in results["samples"] if sample["media"]]
    chosen: list[dict[str, Any]] = []
    size, why = 0, ""
    for sample in present[:samples]:
        files = {name: folder / file for name, file in sample["media"].items()}
        for path in files.values():
            if not path.is_file():
                raise ValueError(f"{path}: missing, but sample {sample['id']!r} has it")
            size += path.stat().st_size
        if size > page_bytes:
            why = f" (a page holds at most {page_bytes // 2**20} MiB of media)"
            break
        media = {
            name: [MEDIA[x.suffix.lower()], base64.b64encode(x.read_bytes()).decode("ascii")]
            for name, x in files.items()
        }
        chosen.append({"id": sample["id"], "prompt": sample["prompt"], "media": media})
    if len(chosen) == len(present):
        return chosen, ""
    note = f"{len(chosen)} of {len(present)} samples are in this page{why}; the others are in the "
    return chosen, note + "folders beside it."


def _fps(folder: Path, results: Results) -> float:
    """Return the frame rate of the first clip."""
    files = [file for sample in results["samples"] for file in sample["media"].values()]
    clip = next((x for x in files if x.lower().endswith(".mp4")), None)
    if clip is None:
        return 16.0
    import imageio.v3 as iio

    return float(iio.immeta(folder / clip, plugin="FFMPEG")["fps"])


def _sources(results: Results, metrics: list[str]) -> list[dict[str, Any]]:
    """Return network, size and notes of each metric, as in the first row that has it."""
    found = []
    for key in metrics:
        metric = next(row["metrics"][key] for row in results["rows"] if key in row["metrics"])
        against = f" against {metric['n_reference']}" if "n_reference" in metric else ""
        texts = {"label": definition(key).label, "n": sample_size(metric) + against}
        found.append({**metric, **texts, "notes": ", ".join(metric_notes(metric))})
    return found


def _hash(text: str) -> str:
    """Return the hash for the content security policy: the page runs and applies this text only."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
