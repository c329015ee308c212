"""Small data sets."""

import json

import pytest

from .fakes import FakeModel
from .videos import write_clip


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def dataset(tmp_path):
    """`dataset(count, **clip)`: a folder of clips with captions.jsonl, as `dit-accel demo make-data` writes it."""

    def write(count=4, name="data", **clip):
        folder = tmp_path / name
        (folder / "videos").mkdir(parents=True)
        rows = []
        for i in range(count):
            file = f"videos/{i:05d}.mp4"
            write_clip(
                folder / file,
                clip.get("frames", 9),
                **{k: x for k, x in clip.items() if k != "frames"},
            )
            rows.append({"file_name": file, "text": f"clip {i}", "shape": "circle"})
        (folder / "captions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
        return folder

    return write
