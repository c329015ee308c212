"""The log of a run, and its curves."""

import json

import pytest

from dit_accel.finetune.curves import draw_curves, moving_average, points_of
from dit_accel.finetune.log import RunLog, read_log
from dit_accel.sampling.image_files import read_image

STAGES = ("regression", "distillation")


def written(folder, **options):
    log = RunLog(folder, stages=STAGES, **options)
    log.write("regression", 1, {"loss": 0.5})
    log.write("regression", 2, {"loss": 0.25})
    log.write("distillation", 0, {"validation/psnr": 20.0, "validation/ssim": 0.5})
    for step in range(1, 5):
        log.write("distillation", step, {"loss": 1 / step, "gradient_norm": 2.0})
    log.close()
    return log


def test_lines(tmp_path):
    written(tmp_path)
    records = read_log(tmp_path / "log.jsonl")
    assert len(records) == 7
    assert records[3] == {"stage": "distillation", "step": 1, "loss": 1.0, "gradient_norm": 2.0}


def test_values_that_json_has_not_are_named(tmp_path):
    log = RunLog(tmp_path)
    log.write("distillation", 1, {"loss": float("nan"), "norm": float("inf")})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "stage": "distillation", "step": 1, "loss": "nan", "norm": "inf",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("after", "kept", "validated"),
    [
        (None, [], set()),
        (("distillation", 0), [1, 2, 0], {("distillation", 0)}),
        (("distillation", 2), [1, 2, 0, 1, 2], {("distillation", 0)}),
        (("regression", 1), [1], set()),
    ],
)
def test_lines_after_the_checkpoint_go(tmp_path, after, kept, validated):
    written(tmp_path)
    log = RunLog(tmp_path, after=after, stages=STAGES)
    assert [x["step"] for x in read_log(tmp_path / "log.jsonl")] == kept
    assert log.validated == validated


def test_line_that_a_kill_left_unfinished(tmp_path):
    written(tmp_path)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"stage": "distil')
    assert len(read_log(path)) == 7
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ValueError, match=r"log.jsonl, line 1: .*JSON"):
        read_log(path)


def test_other_processes_write_nothing(tmp_path):
    written(tmp_path, is_main=False)
    assert list(tmp_path.iterdir()) == []


def test_tracker_gets_numbers_by_stage(tmp_path):
    told = []
    log = RunLog(tmp_path)
    log.write("regression", 1, {"loss": 1.0})
    log.start_tracker(lambda values, step: told.append((values, step)))
    log.write("distillation", 1, {"loss": 2.0, "name": "x"})
    assert told == [({"distillation/loss": 2.0}, 1)]


def test_curves(tmp_path):
    written(tmp_path)
    path = draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    small = read_image(path)
    log = RunLog(tmp_path, after=("distillation", 99), stages=STAGES)
    log.write("distillation", 5, {"density": 0.1})
    bigger = read_image(draw_curves(tmp_path / "log.jsonl", path))
    assert small.shape[1] == bigger.shape[1]
    assert bigger.shape[0] > small.shape[0]  # a panel more
    assert small.std() > 10


def test_each_group_of_parameters_has_its_learning_rate():
    names = {"learning_rate": 1.0, "learning_rate/weights": 1.0, "learning_rate/sla": 2.0}
    records = [{"stage": "distillation", "step": step, **names} for step in (1, 2)]
    assert points_of(records, "learning_rate") == {
        ("distillation", "weights"): [(1, 1.0), (2, 1.0)],
        ("distillation", "sla"): [(1, 2.0), (2, 2.0)],
    }
    alone = [{"stage": "regression", "step": 1, "learning_rate": 3.0, "loss": float("nan")}]
    assert points_of(alone, "learning_rate") == {("regression", ""): [(1, 3.0)]}
    assert points_of(alone, "loss") == {}


def test_curves_of_an_empty_log(tmp_path):
    RunLog(tmp_path)
    with pytest.raises(ValueError, match=r"log='.*': .*no values"):
        draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert [x.name for x in tmp_path.iterdir()] == ["log.jsonl"]


def test_moving_average():
    assert moving_average([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
