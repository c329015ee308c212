"""`dit-accel eval report`."""

import json

import pytest

from dit_accel.eval.results.store import read_results

from ..eval.example_report import example_results, write_media
from .command import run


def printed(capsys):
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def evaluated(tmp_path):
    folder = tmp_path / "evaluated"
    folder.mkdir()
    results = example_results()
    results["samples"] = write_media(folder, results, count=1, kind="png")
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_report_writes_its_files_and_judges_conditions(evaluated, capsys):
    assert run("eval", "report", evaluated, "--title", "mine") == 0
    out = capsys.readouterr().out
    assert "RAS balanced" in out
    for name in ("table.md", "report.html", "grid.png"):
        assert str(evaluated / name) in out
        assert (evaluated / name).stat().st_size > 100
    assert "# mine" in (evaluated / "table.md").read_text()
    assert run("eval", "report", evaluated, "--format", "json") == 0
    assert printed(capsys) == read_results(evaluated)
    assert run("eval", "report", evaluated, "--fail-if", "RAS + SLA: psnr<25") == 0
    assert run("eval", "report", evaluated, "--fail-if", "RAS + SLA: psnr<30") == 3
    assert "fail_if: RAS + SLA: psnr is 26.3, fails < 30" in capsys.readouterr().err
    # A metric that is not there is no pass.
    page = (evaluated / "report.html").read_bytes()
    assert run("eval", "report", evaluated, "--title", "new", "--fail-if", "cost>3") == 2
    assert "cost of row" in capsys.readouterr().err
    assert (evaluated / "report.html").read_bytes() == page
    assert run("eval", "report", evaluated / "none") == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none"], "none"),
        (["."], "results.json"),
        (["evaluated", "--shown", "-1"], "shown=-1"),
        (["evaluated", "--fail-if", "psnr"], "fail_if='psnr'"),
        (["evaluated", "--fail-if", "pnsr<3"], "pnsr"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_refused_and_nothing_is_written(refused, evaluated, arguments, named):
    assert named in refused("eval", "report", *arguments)
