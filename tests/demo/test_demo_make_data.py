import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from dit_accel.demo import ShapesDataset, make_data
from dit_accel.demo import dataset as dataset_module


def test_round_trip(tmp_path):
    folder = make_data(
        tmp_path / "clips", 3, seed=4, num_frames=9, height=48, width=64, progress=False
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clips"]
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"videos/{i:05d}.mp4" for i in range(3)]
    wanted = ShapesDataset(size=3, seed=4, num_frames=9, height=48, width=64)
    for i, line in enumerate(lines):
        assert line["text"] == wanted[i]["caption"]
        assert line["shape"] in line["text"]
        frames = torch.from_numpy(
            np.asarray(iio.imread(folder / line["file_name"], plugin="FFMPEG"))
        )
        video = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
        assert video.shape == wanted[i]["video"].shape
        assert (video - wanted[i]["video"]).abs().mean() < 0.02


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir"):
        make_data(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset_module, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        make_data(tmp_path / "clips", 2, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_clips", 0), ("height", 33), ("fps", 0), ("split", "none"), ("width", 4)],
)
def test_bad_arguments_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make_data(tmp_path / "clips", **{"num_clips": 1, name: value})
    assert not (tmp_path / "clips").exists()
