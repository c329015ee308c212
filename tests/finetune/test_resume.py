"""Choice of the checkpoint that a run resumes from, and settings that may change then."""

import dataclasses

import pytest

from dit_accel.finetune.checkpoints import MANIFEST, read_checkpoint, save_checkpoint
from dit_accel.finetune.resume import FREE, check_samples, check_settings, choose_checkpoint

from .fakes import FakeConfig

CONFIG = FakeConfig(train_batch_size=4, gradient_accumulation_steps=2).to_dict()


def save(folder, step, config=CONFIG, processes=2):
    state = {
        "config": config,
        "processes": processes,
        "stage": "distillation",
        "numbers": {},
        "samples": "abc",
    }
    return save_checkpoint(folder, step, {"weights": {}}, state)


def test_new_run(tmp_path):
    assert choose_checkpoint(tmp_path, None) is None
    assert choose_checkpoint(tmp_path / "missing", None) is None
    assert choose_checkpoint(tmp_path, "latest") is None  # a job that is always started in this way


def test_new_run_in_the_folder_of_another_is_refused(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(ValueError, match=r"^output_dir='.*checkpoint-5.*'latest'"):
        choose_checkpoint(tmp_path, None)


def test_latest_valid_one_and_what_was_skipped(tmp_path, capsys):
    save(tmp_path, 5)
    (save(tmp_path, 9) / MANIFEST).unlink()
    assert choose_checkpoint(tmp_path, "latest").step == 5
    line = capsys.readouterr().err
    assert line.startswith("skipped checkpoint-9: ")
    assert MANIFEST in line


def test_no_valid_one_is_refused(tmp_path):
    (save(tmp_path, 9) / MANIFEST).unlink()
    with pytest.raises(
        ValueError,
        match=rf"^resume_from_checkpoint='latest': .*\(checkpoint-9: {MANIFEST} is missing\)",
    ):
        choose_checkpoint(tmp_path, "latest")


def test_named_one(tmp_path):
    path = save(tmp_path / "a" if (tmp_path / "a").mkdir() is None else None, 5)
    assert choose_checkpoint(tmp_path / "b", str(path)).step == 5
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint='.*/c'"):
        choose_checkpoint(tmp_path, str(tmp_path / "c"))
    (path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=f"^resume_from_checkpoint='.*{MANIFEST} is missing"):
        choose_checkpoint(tmp_path, str(path))


def test_named_one_beside_newer_ones_is_refused(tmp_path):
    path = save(tmp_path, 5)
    save(tmp_path, 9)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint='.*\(checkpoint-9\)"):
        choose_checkpoint(tmp_path, str(path))


def checked(tmp_path, processes=2, **changed):
    check_settings(read_checkpoint(save(tmp_path, 3)), CONFIG | changed, processes)


def test_same_settings(tmp_path):
    checked(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.1),
        ("seed", 8),
        ("mixed_precision", "bf16"),
        ("sla", {"topk": 0.2}),
        ("optimizer", "prodigy"),
        ("use_ema", False),
        ("new_option", 1),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(
        ValueError,
        match=f"^{name}=.*: .*checkpoint-3 .*{name}=",
    ):
        checked(tmp_path, **{name: value})


def test_only_the_differing_entries_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^sla=\{'skip': 0.1\}.*sla=\{'skip': None\}"):
        checked(tmp_path, sla={"topk": 0.1, "skip": 0.1})


@pytest.mark.parametrize(
    "name", sorted(FREE - {"train_batch_size", "gradient_accumulation_steps", "max_train_steps"})
)
def test_settings_that_do_not_change_the_result_are_free(tmp_path, name):
    checked(tmp_path, **{name: "other"})


@pytest.mark.parametrize(
    ("size", "accumulation", "processes"), [(8, 2, 1), (16, 1, 1), (2, 2, 4), (1, 1, 16)]
)
def test_equal_global_batches(tmp_path, size, accumulation, processes):
    checked(tmp_path, processes, train_batch_size=size, gradient_accumulation_steps=accumulation)


def test_other_global_batches_are_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"train_batch_size=4, gradient_accumulation_steps=2, 3 processes: 24 .*16 \(2 processes\)",
    ):
        checked(tmp_path, 3)


def test_more_steps(tmp_path):
    checked(tmp_path, max_train_steps=100)
    with pytest.raises(ValueError, match=r"max_train_steps=2: .* 3, .*checkpoint-3"):
        checked(tmp_path, max_train_steps=2)
    falling = dataclasses.replace(FakeConfig(), lr_scheduler="cosine").to_dict()
    checkpoint = read_checkpoint(save(tmp_path, 4, config=falling))
    with pytest.raises(ValueError, match=r"^max_train_steps=100: .*lr_scheduler='cosine'"):
        check_settings(checkpoint, falling | {"max_train_steps": 100}, 2)


def test_other_samples_are_refused(tmp_path):
    checkpoint = read_checkpoint(save(tmp_path, 3))
    check_samples(checkpoint, "abc", ["precomputed_dir"])
    with pytest.raises(
        ValueError,
        match=r"^precomputed_dir: .*checkpoint-3",
    ):
        check_samples(checkpoint, "abd", ["precomputed_dir"])
