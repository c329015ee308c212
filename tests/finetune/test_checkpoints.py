"""Training checkpoints: complete or not there, whatever happens while they are written."""

import contextlib
import errno
import json
import os
import shutil
import subprocess

import pytest
import torch

from dit_accel.finetune import checkpoints as module
from dit_accel.finetune.checkpoints import (
    MANIFEST,
    STATE,
    checkpoints,
    find_latest,
    read_checkpoint,
    save_checkpoint,
)

from .faults import Writes, fill_disk, in_child, kill


def groups(value, rows=100):
    return {
        "weights": {"a": torch.full((rows, 3), value), "b": torch.full((), value)},
        "optimizer": {"a/exp_avg": torch.full((rows, 3), -value), "a/step": torch.tensor(value)},
    }


def value_of(checkpoint):
    """The value that all tensors of a checkpoint have, and its state."""
    values = set()
    for group, sign in (("weights", 1), ("optimizer", -1)):
        with checkpoint.reader(group) as reader:
            for name in reader.names:
                x = reader.read(name)
                assert (x == x.flatten()[0]).all()
                values.add(float(x.flatten()[0]) * (sign if name != "a/step" else 1))
    [value] = values
    assert checkpoint.state == {"value": value}
    return value


def save(folder, step, **options):
    return save_checkpoint(folder, step, groups(float(step)), {"value": float(step)}, **options)


def names(folder):
    return sorted(x.name for x in folder.iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path, 3)
    assert names(path) == [
        MANIFEST,
        "optimizer-00000-of-00001.safetensors",
        STATE,
        "weights-00000-of-00001.safetensors",
    ]
    found, skipped = find_latest(tmp_path)
    assert (found.step, value_of(found), skipped) == (3, 3.0, [])


def test_latest_is_the_newest_by_number(tmp_path):
    for step in (2, 10, 9):
        save(tmp_path, step)
    assert find_latest(tmp_path)[0].step == 10


def test_no_checkpoints(tmp_path):
    assert find_latest(tmp_path) == (None, [])
    assert find_latest(tmp_path / "missing") == (None, [])


def test_limit_removes_the_oldest(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_damaged_ones_do_not_push_out_good_ones(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 9)
    (tmp_path / "checkpoint-9" / MANIFEST).unlink()
    save(tmp_path, 2, limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_same_step_is_replaced(tmp_path):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, groups(7.0), {"value": 7.0})
    assert value_of(find_latest(tmp_path)[0]) == 7.0
    assert names(tmp_path) == ["checkpoint-1"]


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_manifest(**changed):
    def change(path):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | changed))

    return change


WEIGHTS = "weights-00000-of-00001.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        (WEIGHTS, truncate, rf"{WEIGHTS} .*\d+ of \d+ bytes"),
        (WEIGHTS, flip, f"{WEIGHTS} .*sha256"),
        (WEIGHTS, os.unlink, f"{WEIGHTS} is missing"),
        (STATE, flip, f"{STATE} .*sha256"),
        (MANIFEST, os.unlink, f"{MANIFEST} is missing"),
        (MANIFEST, truncate, f"{MANIFEST} is not readable"),
        (MANIFEST, edit_manifest(format_version=99), "format_version=99: .* 1"),
        (
            MANIFEST,
            edit_manifest(files={"../x": {"size": 1, "sha256": ""}, STATE: {}}),
            rf"{MANIFEST} .*'../x'",
        ),
        (MANIFEST, edit_manifest(step="4"), f"{MANIFEST} is incomplete"),
        (MANIFEST, lambda path: path.write_text("[]"), f"{MANIFEST} is not readable"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_damaged_ones_are_skipped_with_the_reason(tmp_path, file, damage, reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / file)
    noted = []
    found, skipped = find_latest(tmp_path, note=noted.append)
    assert found.step == 1
    [line] = skipped
    assert line.startswith("checkpoint-2: ")
    assert noted == [f"skipped {line}"]
    with pytest.raises(ValueError, match=reason):
        read_checkpoint(tmp_path / "checkpoint-2")


def test_folders_of_other_names_are_none(tmp_path):
    save(tmp_path, 1)
    for name in ("checkpoint-2-tmp", "checkpoint-x", ".tmp-checkpoint-3", "checkpoints"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]


def test_nothing_that_is_not_a_number_is_written_to_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, groups(1.0), {"value": float("nan")})


# Faults -----------------------------------------------------------------------------------------------


def count_points(folder):
    """Points at which a save with pruning writes."""

    def action():
        writes = Writes(folder, at=0, fault=kill)
        save(folder, 2, limit=1)
        return writes.count

    return in_child(action)[1]


def test_sigkill_at_every_point_of_a_save_loses_nothing(quick):
    (quick / "count").mkdir()
    save(quick / "count", 1)
    points = count_points(quick / "count")
    assert points > 30
    survivors = []
    for at in range(1, points + 1):
        folder = quick / f"run-{at}"
        folder.mkdir()
        save(folder, 1)

        def action(folder=folder, at=at):
            Writes(folder, at, kill)
            save(folder, 2, limit=1)

        assert in_child(action)[0] == "killed"
        found, skipped = find_latest(folder)
        assert value_of(found) == found.step
        assert not skipped  # a half one never has the name of a checkpoint
        survivors.append(found.step)
        save(folder, 2, limit=1)
        assert names(folder) == ["checkpoint-2"]
        assert value_of(find_latest(folder)[0]) == 2.0
        shutil.rmtree(folder)
    assert survivors == sorted(survivors)  # the new one appears at one point
    assert set(survivors) == {1, 2}


def test_full_disk_at_every_point_of_a_save_leaves_the_old_one(quick):
    (quick / "count").mkdir()
    save(quick / "count", 1)
    outcomes = set()
    for at in range(1, count_points(quick / "count") + 1):
        folder = quick / f"run-{at}"
        folder.mkdir()
        save(folder, 1)

        def action(folder=folder, at=at):
            Writes(folder, at, fill_disk)
            with contextlib.suppress(RuntimeError):
                save(folder, 2, limit=1)
                return "saved"
            return "refused"

        kind, outcome = in_child(action)
        # Removing what nobody needs any more may fail in silence, and after the rename the new one is there.
        assert kind == "returned" or "prune" in outcome
        outcomes.add(outcome if kind == "returned" else "prune")
        found, _ = find_latest(folder)
        assert value_of(found) == found.step
        if outcome == "refused":  # the old one stays, even if the new one is complete
            assert value_of(read_checkpoint(folder / "checkpoint-1")) == 1.0
        shutil.rmtree(folder)
    assert "refused" in outcomes


def test_full_disk_says_what_to_do(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(RuntimeError, match=r"checkpoint-2: .*No space left on device.*latest"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]


def test_small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not possible here")
    try:
        save(disk, 1)
        with pytest.raises(RuntimeError, match=r"No space left|could not be written"):
            save_checkpoint(disk, 2, groups(2.0, rows=100_000), {"value": 2.0})
        assert names(disk) == ["checkpoint-1"]  # the space is free again
        assert value_of(find_latest(disk)[0]) == 1.0
        save(disk, 2, limit=1)
        assert value_of(find_latest(disk)[0]) == 2.0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
