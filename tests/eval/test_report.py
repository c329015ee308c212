"""The report: results.json is checked, and table, grid and page say what it says."""

import base64
import copy
import hashlib
import html.parser
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dit_accel.eval.results.store import build_results, read_results, validate, write_results
from dit_accel.eval.results.types import reference_row
from dit_accel.eval.runs.rows import speedup, timing
from dit_accel.eval.view.cells import metric_cell, number, seconds_cell, speedup_cell
from dit_accel.eval.view.conditions import check
from dit_accel.eval.view.definitions import definition, usual_order
from dit_accel.eval.view.equal_time import equal_time
from dit_accel.eval.view.grid import grid
from dit_accel.eval.view.plot import plotted_rows, quality_plot
from dit_accel.eval.view.report import page_samples, report
from dit_accel.eval.view.table import build_table, escape, markdown

from .example_report import example_results, metric, write_media

GOLDEN = Path(__file__).with_name("golden_table.md")
HOSTILE = (
    '"><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">',
    "</script><script>window.hacked = 1</script><!-- <script>",
    "' autofocus onfocus='window.hacked = 1' {{ 7 * 7 }} {% raw %} \\u003cb\\u003e",
    "\N{RIGHT-TO-LEFT OVERRIDE}\N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED} <b>x</b> \0",
    "long" * 1500,
)


def change(data, path, value):
    """`data` with one place set; `...` removes it."""
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.fixture
def results():
    return example_results()


@pytest.fixture
def folder(tmp_path, results):
    """An evaluation of stills on disk: ten samples of four rows."""
    names = ("Dense", "Dense, 12 steps", "SLA balanced", "RAS + SLA")
    results["samples"] = write_media(tmp_path, results, 10, "png", size=32, names=names)
    write_results(tmp_path, results)
    return tmp_path


# results.json


def test_results_are_read_as_they_were_written(tmp_path, results):
    path = write_results(tmp_path, results)
    assert read_results(path) == read_results(tmp_path) == results


def test_build_adds_versions_and_machine_and_checks(results):
    keys = ("title", "model", "sampling", "prompts", "repeats", "rows", "samples")
    built = build_results(**{key: results[key] for key in keys})
    assert built["versions"]["torch"]
    assert built["machine"]["cores"] >= 1
    assert validate(built) is built
    with pytest.raises(ValueError, match="prompts=0"):
        build_results(**{**{key: results[key] for key in keys}, "prompts": 0})


ROW = ("rows", 7)
PSNR = (*ROW, "metrics", "psnr")
PHASE = {"median": 1.0, "iqr": [1.0, 1.0], "n": 1}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 2, r"format_version=2"),
        (("kind",), "compare", r"kind='compare'"),
        (("title",), ..., r"title is missing"),
        (("title",), " ", r"title=' '"),
        (("title",), "a\ud800", r"title='a.*'"),
        (("repeats",), True, r"repeats=True"),
        (("rows",), {}, r"rows=\{\}"),
        (("rows",), [], r"rows=\[\]"),
        (("rows", 0), "dense", r"rows\[0\]='dense'"),
        (("reference",), "teacher", r"reference='teacher'"),
        ((*ROW, "name"), "Dense", r"rows\[7\].name='Dense'"),
        ((*ROW, "method"), "magic", r"rows\[7\].method='magic'"),
        ((*ROW, "available"), 1, r"rows\[7\].available=1"),
        ((*ROW, "available"), False, r"rows\[7\].why=None"),
        ((*ROW, "density"), 1.5, r"rows\[7\].density=1.5"),
        ((*ROW, "folder"), "../up", r"rows\[7\].folder='../up'"),
        ((*ROW, "peak_memory_of"), None, r"peak_memory_of=None"),
        ((*ROW, "speedup", "total"), ..., r"rows\[7\].speedup.total is missing"),
        ((*ROW, "seconds", "warm_up"), PHASE, r"rows\[7\].seconds.*warm_up"),
        ((*ROW, "seconds", "text", "iqr"), [2, 1], r"seconds.text.iqr=\[2, 1\]"),
        ((*PSNR, "value"), math.nan, r"rows\[7\].metrics.psnr.value=nan"),
        ((*PSNR, "value"), None, r"rows\[7\].metrics.psnr.why is missing"),
        ((*PSNR, "n"), -1, r"rows\[7\].metrics.psnr.n=-1"),
        ((*PSNR, "interval_95"), [1.0, math.inf], r"interval_95=\[1.0, inf\]"),
        ((*PSNR, "extractor"), {"id": "x"}, r"metrics.psnr.extractor.sha256 is missing"),
        ((*PSNR, "flags"), "few", r"metrics.psnr.flags='few'"),
        ((*PSNR, "truncated"), "x", r"metrics.psnr.truncated='x'"),
        ((*PSNR, "values"), {"a": "x"}, r"metrics.psnr.values.a='x'"),
    ],
)
def test_a_bad_place_is_named(results, path, value, message):
    validate(results)
    with pytest.raises(ValueError, match=message):
        validate(change(results, path, value))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "a/../../b.png", "C:\\x.png", "C:/x.png", "x.svg", ""]
)
def test_media_stay_inside_the_folder(results, path):
    results["samples"] = [{"id": "0", "prompt": "", "media": {"Dense": "dense/0.png"}}]
    validate(results)
    with pytest.raises(ValueError, match=r"samples\[0\].media.Dense="):
        validate(change(results, ("samples", 0, "media", "Dense"), path))
    with pytest.raises(ValueError, match=r"samples\[0\].media: row='x'"):
        validate(change(results, ("samples", 0, "media"), {"x": "x.png"}))


def test_unreadable_results_are_named(tmp_path, results):
    with pytest.raises(ValueError, match=r"cannot read results.json \(No such file"):
        read_results(tmp_path)
    file = tmp_path / "results.json"
    file.write_text('{"format_version": 1,')
    with pytest.raises(ValueError, match=r"results.json is not JSON \(Expecting"):
        read_results(tmp_path)
    file.write_text(json.dumps(change(results, (*PSNR, "value"), math.nan)))
    with pytest.raises(ValueError, match=r"results.json: rows\[7\].metrics.psnr.value=nan"):
        read_results(file)


def test_bad_results_are_not_written(tmp_path, results):
    write_results(tmp_path, results)
    with pytest.raises(ValueError, match="value=nan"):
        write_results(tmp_path, change(results, (*PSNR, "value"), math.nan))
    assert read_results(tmp_path) == results


def test_timing_takes_median_and_quartiles_of_common_phases():
    runs = [{"total": x, "denoise": x / 2} for x in (4.0, 1.0, 2.0, 3.0, 10.0)]
    runs[0]["text"] = 1.0
    assert timing(runs) == {
        "denoise": {"median": 1.5, "iqr": [1.0, 2.0], "n": 5},
        "total": {"median": 3.0, "iqr": [2.0, 4.0], "n": 5},
    }
    assert speedup(timing(runs), timing(runs[1:2])) == {"denoise": 3.0, "total": 3.0}
    assert speedup(timing(runs), {}) is None
    assert timing([]) == {}


def test_the_reference_is_found_by_name_before_method(results):
    assert reference_row(results)["name"] == "Dense"
    results["reference"] = "Dense, 12 steps"
    assert reference_row(results)["num_inference_steps"] == 12


# Metrics as text


def test_numbers_are_rounded_and_signed():
    assert number(-0.004, 2) == "0.00"
    assert number(-0.004, 2, signed=True) == "\N{PLUS-MINUS SIGN}0.00"
    assert number(-1.25, 1) == "\N{MINUS SIGN}1.2"
    assert number(3.0, 1, signed=True) == "+3.0"
    assert number(1234567.0, 0) == "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"


def test_a_metric_shows_interval_difference_and_what_limits_it():
    about = definition("psnr")
    part = metric(31.239, 0.5, "dB", infinite=3)
    cell = metric_cell(part, about, metric(30.0, None, "dB"))
    assert (cell.text, cell.range, cell.delta) == ("31.24", "[30.74, 31.74]", "+1.24")
    assert (cell.n, cell.note) == ("24", "3 identical pairs left out")
    same = metric_cell(metric(None, None, "dB", infinite=24, why="all identical"), about)
    assert (same.text, same.value) == ("identical", math.inf)
    none = metric_cell(metric(None, None, "dB", n=0, why="no pairs"), about)
    assert (none.text, none.value) == ("no value: no pairs", None)
    clips = metric(1.0, None, "", n=792, of="frames", flags=["rank-deficient"])
    assert metric_cell(clips, definition("fd_tiny")).n == "792 frames"
    assert metric_cell(clips, definition("fd_tiny")).note == "rank-deficient"


def test_seconds_have_three_digits_and_quartiles():
    cell = seconds_cell({"median": 12.345, "iqr": [12.0, 13.0], "n": 5})
    assert (cell.text, cell.range) == ("12.3", "(12.0\N{EN DASH}13.0)")
    assert seconds_cell({"median": 0.0123, "iqr": [0.0123, 0.0123], "n": 1}).range == ""
    row = {"median": 2.0, "iqr": [1.6, 2.5], "n": 5}
    reference = {"median": 4.0, "iqr": [3.0, 4.8], "n": 5}
    cell = speedup_cell(2.0, row, reference)
    assert (cell.text, cell.range) == ("2.00\N{MULTIPLICATION SIGN}", "(1.20\N{EN DASH}3.00)")


def test_variants_and_unknown_metrics_have_names():
    assert definition("fd_dino").label == "FD (dino)"
    assert definition("judge_motion").better == "higher"
    assert definition("vibes").label == "vibes"
    assert definition("vibes").better is None
    keys = ["vibes", "judge_motion", "fd_tiny", "judge", "psnr"]
    assert sorted(keys, key=usual_order) == ["psnr", "fd_tiny", "judge", "judge_motion", "vibes"]


# The table


def test_table_md_is_as_it_was_looked_at(results):
    """Rewrite golden_table.md from `markdown(example_results())` after a change, and read it."""
    assert markdown(results) == GOLDEN.read_text(encoding="utf-8")


def test_the_best_is_marked_unless_most_rows_have_it(results):
    table = build_table(results)
    best = {
        column.key: [line.row["name"] for line in table.lines if line.cells[i].best]
        for i, column in enumerate(table.columns)
    }
    assert best["psnr"] == ["SLA, every key"]  # identical beats every finite value
    assert best["seconds_total"] == ["RAS + SLA"]
    assert best["fd_tiny"] == ["Dense", "SLA, every key"]
    assert best["peak_memory_bytes"] == best["density"] == []


def test_a_metric_without_value_says_why_and_hides_no_n(results):
    results["rows"][4]["metrics"]["ssim"] = metric(None, None, "", n=0, why="frames | differ")
    results["rows"][6]["metrics"]["judge"]["n"] = 23
    table = build_table(results)
    sizes = {column.key: column.n for column in table.columns}
    assert (sizes["ssim"], sizes["judge"]) == ("24", "")
    text = markdown(results)
    assert r"| no value: frames \| differ |" in text
    assert "n = 23" in text


def test_metrics_that_are_gone_are_shown_without_a_description(results):
    for i, row in enumerate(results["rows"]):
        row["metrics"] |= {"sfid": metric(10.0 + i, None, "squared feature distance")}
    table = build_table(validate(results))
    column = next(x for x in table.columns if x.key == "sfid")
    assert (column.label, column.arrow) == ("sfid", "")
    assert "not describe" in column.about.text
    place = table.columns.index(column)
    assert not any(line.cells[place].best for line in table.lines)


def test_names_cannot_break_the_table(results):
    results["rows"][7]["name"] = "a | b\n<script> `c` [d](e) *f*"
    lines = markdown(results).splitlines()
    [line] = [line for line in lines if line.startswith("| a ")]
    assert line.startswith(r"| a \| b \<script> \`c\` \[d\](e) \*f\* | 24 |")
    bars = [x.replace(r"\|", "").count("|") for x in lines if x.startswith("|")]
    assert len(set(bars)) == 1
    assert escape("ras_sla") == r"ras\_sla"


def test_a_run_without_timing_or_samples_has_a_table(results):
    for row in results["rows"]:
        row |= {"seconds": {}, "speedup": None, "peak_memory_bytes": None, "peak_memory_of": None}
        row |= {"density": None, "cost": None}
    validate(results)
    keys = [column.key for column in build_table(results).columns]
    assert keys == ["psnr", "ssim", "fd_tiny", "flicker", "judge", "judge_motion"]
    assert "## At equal time" not in markdown(results)


# At equal time


def around(value, spread=0.1, n=24):
    """Values of single samples, of this mean."""
    return {str(i): value + spread * (1 if i % 2 else -1) for i in range(n)}


def dense_and_one(method="sla", seconds=3.0, value=25.0, spread=0.5):
    """Dense with 10 and 20 steps at 2 s and 4 s, 20 dB and 24 dB; one accelerated row."""
    data = example_results()
    rows = [data["rows"][i] for i in (0, 1, 2, 7)]
    for row, at, psnr in zip(
        rows, (8.0, 4.0, 2.0, seconds), (None, 24.0, 20.0, value), strict=True
    ):
        row["seconds"]["total"] = {"median": at, "iqr": [at, at], "n": 5}
        if psnr is not None:
            row["metrics"]["psnr"] = metric(psnr, spread, "dB", values=around(psnr))
    rows[3]["method"] = method
    return {**data, "rows": rows}


@pytest.mark.parametrize(
    ("changed", "verdict", "difference", "basis"),
    [
        ({}, "better", "+3.00 dB", "interpolated"),
        ({"value": 19.0}, "worse", "\N{MINUS SIGN}3.00 dB", "interpolated"),
        ({"seconds": 1.9}, "better", "+5.00 dB", "15 steps in 2.00 s, this row in 1.90 s"),
        ({"seconds": 1.0}, "unknown", "", "no dense run takes about 1.00 s"),
        ({"seconds": 6.0}, "unknown", "", "no dense run takes about 6.00 s"),
        ({"seconds": 8.5, "value": 40.0}, "worse", "", "the reference itself takes 8.00 s"),
    ],
)
def test_acceleration_is_held_against_fewer_steps(changed, verdict, difference, basis):
    [found] = equal_time(dense_and_one(**changed), "psnr", "total")
    assert (found.verdict, found.difference) == (verdict, difference)
    assert basis in found.basis


def test_without_values_of_single_samples_nothing_is_claimed():
    data = dense_and_one()
    del data["rows"][3]["metrics"]["psnr"]["values"]
    [found] = equal_time(data, "psnr", "total")
    assert (found.verdict, found.difference) == ("open", "+3.00 dB")


@pytest.mark.parametrize(
    ("values", "verdict", "interval"),
    [
        # The line's samples at 3 s are 21.5 to 22.5 dB.
        ([22.6, 22.0, 23.2, 22.2, 22.9, 22.8], "better", "[+0.52, +0.68]"),
        ([21.4, 20.8, 22.0, 21.0, 21.7, 21.6], "worse", "[\N{MINUS SIGN}0.68, \N{MINUS SIGN}0.52]"),
        ([22.6, 20.8, 23.2, 21.0, 22.9, 21.6], "undecided", None),
        ([22.6, 22.0, 23.2, 22.2, 22.9], "few", ""),
    ],
)
def test_the_same_prompts_are_compared_one_by_one(values, verdict, interval):
    """Their own intervals overlap by far: prompts differ more than methods do."""
    line = [22.0, 21.6, 22.5, 21.5, 22.3, 22.1][: len(values)]
    data = dense_and_one(value=float(np.mean(values)), spread=3.0)
    for row, offset in zip(data["rows"][1:3], (2.0, -2.0), strict=True):
        shifted = {str(i): x + offset for i, x in enumerate(line)}
        mean = float(np.mean(list(shifted.values())))
        row["metrics"]["psnr"] |= {"value": mean, "n": len(line), "values": shifted}
    own = {str(i): x for i, x in enumerate(values)}
    data["rows"][3]["metrics"]["psnr"] |= {"n": len(values), "values": own}
    [found] = equal_time(data, "psnr", "total")
    assert found.verdict == verdict
    difference = number(float(np.mean(values) - np.mean(line)), 2, signed=True)
    assert found.difference == f"{difference} dB"
    if interval is None:
        low, high = (
            float(x.replace("\N{MINUS SIGN}", "-")) for x in found.interval[1:-1].split(", ")
        )
        assert low < 0 < high
    else:
        assert found.interval == interval
    own.popitem()  # one pair is identical: its value is none, and the means are all there is
    assert equal_time(data, "psnr", "total")[0].verdict == "open"


def identical_row(data, same=10, of=10):
    """The accelerated row's PSNR with `same` pairs identical to the reference's, the others at 20 dB."""
    values = {str(i): None if i < same else 20.0 for i in range(of)}
    value = None if same == of else 20.0
    found = metric(value, 1.0, "dB", n=of, infinite=same, values=values)
    data["rows"][3]["metrics"]["psnr"] = found | ({"why": "identical"} if value is None else {})
    return data


@pytest.mark.parametrize(
    ("quartiles", "verdict"),
    [((7.0, 7.5), "better"), ((7.7, 8.3), "undecided"), ((8.6, 8.9), "worse")],
)
def test_time_decides_where_samples_are_identical(quartiles, verdict):
    data = identical_row(dense_and_one(seconds=8.0))
    data["rows"][0]["seconds"]["total"]["iqr"] = [7.6, 8.5]
    middle = sum(quartiles) / 2
    data["rows"][3]["seconds"]["total"] |= {"median": middle, "iqr": [*quartiles]}
    [found] = equal_time(data, "psnr", "total")
    assert (found.verdict, found.difference) == (verdict, "identical to the reference")


def test_one_call_tells_no_difference_in_time():
    data = identical_row(dense_and_one(seconds=4.0))
    assert equal_time(data, "psnr", "total")[0].verdict == "better"
    data["rows"][3]["seconds"]["total"]["n"] = 1
    assert equal_time(data, "psnr", "total")[0].verdict == "undecided"


def test_means_that_leave_identical_pairs_out_decide_nothing():
    [found] = equal_time(identical_row(dense_and_one(), same=8), "psnr", "total")
    assert (found.verdict, found.difference) == ("mixed", "")
    data = dense_and_one()
    data["rows"][1]["metrics"]["psnr"]["infinite"] = 3  # of the line
    assert equal_time(data, "psnr", "total")[0].verdict == "mixed"


def test_a_little_longer_than_the_reference_is_not_slower():
    data = dense_and_one(seconds=8.1)
    data["rows"][3]["seconds"]["total"]["iqr"] = [7.9, 8.3]
    assert equal_time(data, "psnr", "total")[0].verdict == "undecided"
    data["rows"][3]["seconds"]["total"] |= {"median": 9.1, "iqr": [9.0, 9.2]}
    assert equal_time(data, "psnr", "total")[0].verdict == "worse"


def test_a_row_slower_than_the_reference_is_held_against_it():
    data = dense_and_one(seconds=20.0)
    [found] = [x for x in equal_time(data, "judge", "total") if x.name == "SLA balanced"]
    assert found.basis == "dense with 24 steps in 8.00 s, this row in 20.0 s"


def test_a_quicker_dense_run_that_is_better_counts_instead_of_the_line():
    data = dense_and_one(value=25.0)
    # At 2 s; 24 dB at 4 s.
    data["rows"][2]["metrics"]["psnr"] |= {"value": 27.0, "values": around(27.0)}
    [found] = equal_time(data, "psnr", "total")
    assert (found.verdict, found.difference) == ("worse", "\N{MINUS SIGN}2.00 dB")
    assert found.basis == "dense with 15 steps in 2.00 s, this row in 3.00 s"


def test_only_acceleration_is_held_against_the_line():
    assert equal_time(dense_and_one("fewer_steps"), "psnr", "total") == []


# Conditions


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("psnr<25", []),
        ("psnr < 26.5", ["RAS + SLA"]),
        ("psnr>=1e3", ["SLA, every key"]),  # identical is infinite
        ("judge<=.875", ["FirstBlockCache 0.1", "RAS + SLA"]),
        ("Dense, 12 steps:psnr<25", ["Dense, 12 steps"]),
        ("fewer_steps: psnr < 27", ["Dense, 15 steps", "Dense, 12 steps"]),
        ("speedup_total < 1", ["SLA, every key"]),
        ("RAS balanced: seconds_denoise > 2", ["RAS balanced"]),
        ("peak_memory_bytes > 900e6", ["RAS + SLA"]),  # 891 MiB,
    ],
)
def test_conditions_that_hold_are_told(results, condition, rows):
    breached = check(results, [condition])
    assert [text.split(": ")[0] for text in breached] == rows


def test_a_breach_tells_value_and_limit(results):
    assert check(results, ["psnr<26.5", "flicker>2"]) == ["RAS + SLA: psnr is 26.3, fails < 26.5"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("psnr", r"fail_if='psnr'"),
        ("psnr = 25", r"fail_if='psnr = 25'"),
        ("psnr < nan", r"fail_if='psnr < nan'"),
        ("psnrr < 25", r"'psnrr'.*psnr, ssim"),
        ("density < 1", r"density.*'FirstBlockCache 0.1'.*no value"),
        ("Dense: psnr < 25", r"psnr.*'Dense'"),
        ("nobody: psnr < 25", r"'nobody'.*'Dense'"),
        ("SeaCache: psnr < 25", r"'SeaCache'.*not available"),
    ],
)
def test_what_cannot_be_judged_is_no_pass(results, condition, message):
    with pytest.raises(ValueError, match=message):
        check(results, [condition])


def test_a_metric_without_a_value_is_no_pass(results):
    results["rows"][6]["metrics"]["psnr"] = metric(None, None, "dB", n=0, why="no pairs")
    with pytest.raises(ValueError, match=r"'RAS balanced'.*no value.*no pairs"):
        check(results, ["psnr<25"])
    for row in results["rows"]:
        row["available"] = row["method"] == "dense"
    with pytest.raises(ValueError, match=r"fail_if='psnr<25'.*no row"):
        check(results, ["psnr<25"])


# The plot


def points_of(drawn):
    """The marker of each row by name: x, y."""
    lines = drawn.axes[0].lines
    return {x.get_label(): x for x in lines if not x.get_label().startswith("_")}


@pytest.mark.parametrize("metric", ["psnr", "fd_tiny"])
def test_points_lie_where_their_values_say(results, metric):
    found = points_of(quality_plot(results, metric, "total"))
    for label, row in plotted_rows(results, metric, "total"):
        value = row["metrics"][metric]["value"]
        point, seconds = found.pop(row["name"]), row["seconds"]["total"]["median"]
        if value is not None:
            assert point.get_xydata().tolist() == [[seconds, value]]
        if row["method"] not in ("dense", "fewer_steps"):
            assert label.isdecimal()
    assert not found


def test_identical_rows_stand_above_the_axes_and_the_reference_is_a_line(results):
    drawn = quality_plot(results, "psnr", "total")
    same = points_of(drawn)["SLA, every key"]
    assert same.get_transform() == drawn.axes[0].get_xaxis_transform()
    assert same.get_ydata()[0] > 1
    texts = [x.get_text() for x in drawn.axes[0].texts]
    assert "identical" in texts
    assert "Dense: 4.12 s" in texts
    assert "18 steps" in texts
    assert len(drawn.axes[0].lines[0].get_xdata()) == 3  # dense with fewer steps
    texts = [x.get_text() for x in quality_plot(results, "judge", "total").axes[0].texts]
    assert not {"identical", "Dense: 4.12 s"} & set(texts)


def test_one_point_is_no_plot(results):
    results["rows"] = results["rows"][:2]
    assert quality_plot(results, "psnr", "total") is None


# Files


def test_a_report_has_table_grid_and_page(folder, results):
    written = report(folder, samples=3)
    assert {key: path.name for key, path in written.items()} == {
        "table": "table.md",
        "page": "report.html",
        "grid": "grid.png",
    }
    assert written["table"].read_text(encoding="utf-8") == markdown(results)
    page = written["page"].read_text(encoding="utf-8")
    table = build_table(results)
    for line in table.lines:  # the same text in both
        for cell in line.cells:
            assert cell.text in page
            assert cell.range in page
    assert "3 of 10 samples are in this page" in page
    assert (
        page.count("data:image/svg+xml;base64,") == 12
    )  # six metrics, total and denoising seconds
    with Image.open(written["grid"]) as image:
        assert image.size == (8 + 4 * 200, 30 + 3 * 226)


def test_a_machine_that_says_nothing_of_itself_is_no_obstacle(folder, results):
    write_results(folder, results | {"machine": {}, "versions": {}})
    assert "<title>" in report(folder)["page"].read_text(encoding="utf-8")


def test_title_and_number_of_samples(folder):
    page = report(folder, title="Another <title>", samples=1)["page"]
    assert "<title>Another &lt;title&gt;</title>" in page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="samples=-1"):
        report(folder, samples=-1)


def test_missing_libraries_are_named_before_any_work(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"jinja2.*dit-accel\[eval\]"):
        report(folder)
    assert not (folder / "table.md").exists()


def test_an_older_grid_goes_with_the_media(folder, results):
    assert report(folder)["grid"].exists()
    write_results(folder, {**results, "samples": []})
    assert set(report(folder)) == {"table", "page"}
    assert not (folder / "grid.png").exists()


def test_missing_and_broken_media_leave_the_old_report(folder):
    before = report(folder)["page"].read_bytes()
    broken = folder / "sla-balanced" / "0001.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0001.png.*picture"):
        report(folder)
    broken.unlink()
    with pytest.raises(ValueError, match=r"0001.png.*sample '0001'"):
        report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".tmp-*"))


def test_a_page_does_not_grow_without_bound(folder, results):
    size = sum((folder / file).stat().st_size for file in results["samples"][0]["media"].values())
    found, note = page_samples(results, folder, 8, page_bytes=round(size * 2.5))
    assert 1 <= len(found) < 8
    assert f"{len(found)} of 10 samples" in note
    assert "MiB" in note
    kept = sum(len(x[1]) for sample in found for x in sample["media"].values())
    assert kept * 0.75 <= size * 2.5


def test_the_grid_shows_samples_below_and_methods_beside_each_other(folder, results):
    results["rows"][3]["name"] = "Dense with a very long name\nand $math$ in a second line"
    results["samples"][0]["prompt"] = "\ud800"  # a lone surrogate
    for sample in results["samples"]:
        sample["media"][results["rows"][3]["name"]] = sample["media"].pop("Dense, 12 steps")
    drawn = grid(results, folder, 2)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    sheet = np.asarray(canvas.buffer_rgba())[..., :3]
    own = np.asarray(Image.open(folder / results["samples"][1]["media"]["RAS + SLA"]))
    top, left = 30 + 226 + 26, 8 + 3 * 200
    np.testing.assert_array_equal(sheet[top + 3 : top + 192 : 6, left + 3 : left + 192 : 6], own)
    texts = [x.get_text() for x in drawn.texts]
    assert "?" in texts
    assert any(x.startswith("Dense with") and x.endswith("…") for x in texts)
    assert grid(results, folder, 0) is None


class _Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self.policy, self.inside = [], [], "", None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.inside = tag
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self.inside = None


def test_hostile_text_stays_text(folder, results):
    for sample, text in zip(results["samples"], HOSTILE, strict=False):
        sample["prompt"] = text
    results["title"] = results["model"] = HOSTILE[0]
    results["rows"][5]["why"] = HOSTILE[1]
    name = results["rows"][7]["name"]
    results["rows"][7]["name"] = HOSTILE[2]
    for sample in results["samples"]:
        sample["media"][HOSTILE[2]] = sample["media"].pop(name)
    write_results(folder, results)
    found = _Tags()
    found.feed(report(folder)["page"].read_text(encoding="utf-8"))
    assert [tag for tag, _ in found.tags].count("script") == 2
    for _, attributes in found.tags:
        assert not [key for key in attributes if key.startswith("on")]
        assert "style" not in attributes  # the policy would block it
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert attributes.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml;")
    data, script = found.scripts
    assert [x["prompt"] for x in json.loads(data)["samples"][:5]] == list(HOSTILE)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in found.policy
    assert "default-src 'none'" in found.policy
