"""Numbered file names that several processes claim in one folder."""

import subprocess
import sys

import pytest

from dit_accel.sampling.claims import CLAIM, claimed_stem

WRITER = """
import sys
from pathlib import Path
from dit_accel.sampling.claims import claimed_stem
folder, name = Path(sys.argv[1]), sys.argv[2]
for i in range(25):
    with claimed_stem(folder) as stem:
        for suffix in (".mp4", ".json"):
            with open(stem.with_suffix(suffix), "x") as file:
                file.write(f"{name} {i}")
"""


def names(folder):
    return sorted(x.name for x in folder.iterdir())


def take(folder, text="x"):
    """Claim the next number, write one file, and return the number."""
    with claimed_stem(folder) as stem:
        stem.with_suffix(".json").write_text(text)
    return stem.name


def test_no_number_is_given_twice(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)]) for i in range(4)
    ]
    assert [x.wait() for x in writers] == [0] * 4
    clips, sidecars = sorted(tmp_path.glob("*.mp4")), sorted(tmp_path.glob("*.json"))
    assert len(clips) == len(sidecars) == 100
    assert [x.stem for x in clips] == [f"{i:04d}" for i in range(100)]
    texts = [x.read_text() for x in clips]
    assert texts == [x.read_text() for x in sidecars]
    assert len(set(texts)) == 100
    assert len(names(tmp_path)) == 200


@pytest.mark.parametrize(
    ("there", "next_number"),
    [
        ([], "0000"),
        (["0000.mp4"], "0001"),
        (["0004-focus.png", "0001.json"], "0005"),
        (["9999.mp4"], "10000"),
        (["9999.mp4", "10000.mp4", "10000.json"], "10001"),
        (["notes.txt", "12 apples.png", "①②③④.png", "²²²².mp4"], "0000"),
        (["20240101123456.mp4"], "0000"),
        ([CLAIM.format(0)], "0001"),
        ([CLAIM.format(3), "0002.mp4", CLAIM.format(4)], "0005"),
    ],
    ids=str,
)
def test_numbers_go_on_after_what_is_there(tmp_path, there, next_number):
    for name in there:
        (tmp_path / name).write_text("mine")
    assert take(tmp_path) == next_number
    assert names(tmp_path) == sorted([*there, f"{next_number}.json"])
    assert all((tmp_path / name).read_text() == "mine" for name in there)


def test_claims_that_are_open_at_once_differ(tmp_path):
    with claimed_stem(tmp_path) as first, claimed_stem(tmp_path) as second:
        assert take(tmp_path) == "0002"
        assert (first.name, second.name) == ("0000", "0001")
        assert take(tmp_path) == "0003"
    assert names(tmp_path) == ["0002.json", "0003.json"]


def test_a_number_that_was_used_since_the_folder_was_read_is_not_used_again(tmp_path, monkeypatch):
    take(tmp_path, "first")
    monkeypatch.setattr("dit_accel.sampling.claims._next_number", lambda _: 0)
    assert take(tmp_path, "second") == "0001"
    assert (tmp_path / "0000.json").read_text() == "first"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_what_fails_leaves_nothing(tmp_path, error):
    take(tmp_path)

    def fail():
        with claimed_stem(tmp_path) as stem:
            stem.with_suffix(".mp4").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["0000.json"]
    assert take(tmp_path) == "0001"
