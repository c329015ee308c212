"""Judge accuracy: properties that a caption names."""

import numpy as np
import pytest
import torch

from dit_accel.demo.clips import draw_clips, render
from dit_accel.demo.report import score_clips
from dit_accel.eval.metrics.judge import judge, judge_values, unknown_prompt


@pytest.fixture(scope="module")
def clips():
    described = draw_clips(12, torch.Generator().manual_seed(0))
    video = render(described, 9)
    frames = ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    return described, video, frames


def test_captions_ask_what_the_clips_were_drawn_from(clips):
    described, video, frames = clips
    expected = [x["right"] for x in score_clips(video, described)]
    found = judge(list(frames), described.captions(), still=False)
    assert found == expected
    assert {x["background"] for x in found} == {None, True}


def test_wrong_samples_are_found(clips):
    described, _, frames = clips
    found = judge(list(np.roll(frames, 1, axis=0)), described.captions(), still=False)
    assert sum(x["all"] for x in found) < len(found) / 2


def test_stills_are_asked_without_motion(stills):
    images, captions = stills(24)
    found = judge(list(images[:, None]), captions, still=True)
    assert "motion" not in found[0]
    values = judge_values(found)
    assert set(values) == {"judge", "judge_shape", "judge_colour", "judge_background"}
    assert values["judge"]["value"] > 0.9
    assert values["judge"]["n"] == 24
    assert 0 < values["judge_background"]["n"] < 24  # only those that name it
    low, high = values["judge"]["interval_95"]
    assert low < values["judge"]["value"] <= high


def test_other_prompts_are_not_judged(clips):
    captions = {str(i): x for i, x in enumerate(clips[0].captions())}
    ids = list(captions)
    assert unknown_prompt(captions, ids, still=False) is None
    assert "stills" in unknown_prompt(captions, ids, still=True)
    captions["3"] = "a photo of an astronaut"
    assert "'a photo of an astronaut'" in unknown_prompt(captions, ids, still=False)
    assert "'x'" in unknown_prompt({}, ["x"], still=False)
