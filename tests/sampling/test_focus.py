"""Images of the tokens that region-adaptive sampling ran."""

import numpy as np
import pytest

import dit_accel
from dit_accel.sampling.focus import focus_masks, heat, write_focus

from ..random_pipelines import make, run


def test_masks_are_those_of_the_steps():
    pipe = make("wan")
    with pytest.raises(ValueError, match="save_focus=True"):
        focus_masks(pipe)
    dit_accel.enable(pipe, ras={"ratio": 0.5, "warmup": 2})
    run(pipe, "wan")
    masks = focus_masks(pipe)
    steps = [s for s in dit_accel.summary(pipe).ras.steps if s.mode == "partial"]
    assert list(masks) == [s.step for s in steps]
    for step in steps:
        assert masks[step.step].shape == (3, 7, 9)
        assert step.active - 16 < masks[step.step].sum() <= step.active
    run(pipe, "wan", steps=3)
    assert focus_masks(pipe) == {}


def test_heat_runs_from_dark_to_light():
    colours = heat(np.linspace(0, 1, 9).reshape(1, 1, 9))
    light = colours[0, 0].astype(int).sum(-1)
    assert (np.diff(light) > 0).all()


@pytest.mark.parametrize(("frames", "count"), [(1, 1), (1, 11), (3, 11), (5, 1)])
def test_files_have_the_size_of_the_clip(frames, count, tmp_path):
    from PIL import Image

    clip = np.zeros((frames, 32, 48, 3), np.uint8)
    generator = np.random.default_rng(0)
    masks = {3 + i: generator.random((min(frames, 3), 4, 6)) < 0.5 for i in range(count)}
    files = write_focus(tmp_path / "0000", clip, masks, fps=8)
    assert [f.name for f in files] == ["0000-focus.png", "0000-focus.mp4"][: 1 + (frames > 1)]
    picture = np.asarray(Image.open(files[0]))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4
