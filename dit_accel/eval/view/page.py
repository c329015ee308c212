"""report.html: one file without network, fonts or libraries, that works from file://."""

import base64
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from dit_accel.eval.results.types import FORMAT_VERSION, SPEEDUPS, Results
from dit_accel.eval.view.cells import figure_notes, sample_size
from dit_accel.eval.view.definitions import definition
from dit_accel.eval.view.equal_time import equal_time
from dit_accel.eval.view.inline import inline_media
from dit_accel.eval.view.markdown import READING, VERDICTS
from dit_accel.eval.view.plot import quality_plot
from dit_accel.eval.view.table import build_table, metric_keys

TEMPLATES = Path(__file__).parent / "templates"


def render_page(
    results: Results, folder: Path, *, title: str | None = None, samples: int = 8
) -> str:
    """The page as text.

    Args:
        results: checked, see `results.store.read_results`.
        folder: where the media lie.
        title: instead of the results' own.
        samples: at most this many samples have their media inside the page.
    """
    import jinja2

    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # prompts and names are anyone's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pretty"] = lambda data: json.dumps(data, indent=2, ensure_ascii=False)
    table = build_table(results)
    media = inline_media(results, folder, samples)
    metrics = metric_keys(results)
    views = [view for view in _views(results, metrics) if view["wide"] is not None]
    return environment.get_template("page.html.j2").render(
        title=title or results["title"],
        results=results,
        table=table,
        reading=READING,
        views=views,
        labels={key: definition(key).label for key in metrics},
        plotted=[key for key in metrics if any(view["metric"] == key for view in views)],
        phases=[x for x in ("total", "denoise") if any(view["phase"] == x for view in views)],
        verdicts=VERDICTS,
        definitions={column.text: column.label for column in reversed(table.columns)},
        extractors=_extractors(results, metrics),
        media=media,
        player=_player(results, media.samples, media.fps),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        format_version=FORMAT_VERSION,
    )


def _views(results: Results, metrics: list[str]) -> list[dict[str, Any]]:
    """What each choice of metric and seconds shows."""
    return [
        {
            "metric": metric,
            "phase": phase,
            "wide": quality_plot(results, metric, phase),
            "narrow": quality_plot(results, metric, phase, narrow=True),
            "comparisons": equal_time(results, metric, phase),
        }
        for metric, phase in itertools.product(metrics, reversed(SPEEDUPS))
    ]


def _extractors(results: Results, metrics: list[str]) -> list[dict[str, Any]]:
    """Each figure with the network behind it and what it rests on; rows that agree are one entry."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for key in metrics:
        for row in results["rows"]:
            figure = row["metrics"].get(key)
            if figure is None:
                continue
            extractor = figure["extractor"] or {"id": "", "sha256": ""}
            about = {
                "metric": definition(key).label,
                "unit": figure["unit"],
                "id": extractor["id"],
                "sha256": extractor["sha256"],
                "resize": extractor.get("resize") or "",
            }
            empty: dict[str, Any] = {**about, "n": [], "notes": []}
            entry = found.setdefault((key, *about.values()), empty)
            against = figure.get("n_reference")
            size = sample_size(figure) + (f" against {against}" if against else "")
            entry["n"] += [size] if size not in entry["n"] else []
            entry["notes"] += [x for x in figure_notes(figure) if x not in entry["notes"]]
    return list(found.values())


def _player(results: Results, samples: list[dict], fps: float) -> dict[str, Any]:
    """What the script needs. Rows without media in any sample have no player."""
    used = {name for sample in samples for name in sample["media"]}
    rows = [row for row in results["rows"] if row["name"] in used]
    return {
        "rows": [
            {
                "name": row["name"],
                "method": row["method"],
                "note": f"{row['num_inference_steps']} steps",
            }
            for row in rows
        ],
        "samples": samples,
        "fps": fps,
    }


def _hash(text: str) -> str:
    """For the page's content security policy: nothing but this very text may run or style it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
