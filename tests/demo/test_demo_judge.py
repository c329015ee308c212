from types import SimpleNamespace

import pytest
import torch

from dit_accel.demo.clips import describe_clips, render
from dit_accel.demo.judge import UNKNOWN, judge_clips, judge_motion
from dit_accel.demo.report import (
    judge_pipeline,
    judged_clips,
    score_clips,
    wilson_interval,
    write_report,
)
from dit_accel.demo.shape_judge import (
    ShapeJudge,
    load_shape_judge,
    save_shape_judge,
    train_shape_judge,
)
from dit_accel.demo.vocabulary import MOTIONS, combinations


@pytest.fixture(scope="module")
def shape_judge() -> ShapeJudge:
    return train_shape_judge(seed=0, steps=150)


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(33, 64, 64), (9, 64, 96)], ids=["33x64x64", "9x64x96"]
)
def test_every_combination_is_recognised_on_clean_clips(shape_judge, frames, height, width):
    clips = describe_clips(combinations("all"), torch.Generator().manual_seed(1))
    judgement = judge_clips(render(clips, frames, height, width), shape_judge)
    for name in ("colour", "motion", "background"):
        assert torch.equal(getattr(judgement, name), getattr(clips, name)), name
    assert (judgement.shape == clips.shape).float().mean() >= 0.98


def test_the_committed_judge_is_perfect_on_clean_clips():
    clips = describe_clips(combinations("all"), torch.Generator().manual_seed(2))
    judgement = judge_clips(render(clips, 17), load_shape_judge())
    for name in ("shape", "colour", "motion", "background"):
        assert torch.equal(getattr(judgement, name), getattr(clips, name)), name


def test_wrong_clips_are_judged_wrong(shape_judge):
    clips = describe_clips(combinations("all")[:32], torch.Generator().manual_seed(1))
    backwards = render(clips, 9).flip(2)
    assert not any(
        r["right"]["motion"] or r["right"]["all"]
        for r in score_clips(backwards, clips, shape_judge)
    )
    others = render(describe_clips(combinations("all")[-32:], torch.Generator().manual_seed(1)), 9)
    assert not any(
        r["right"]["shape"] or r["right"]["motion"] for r in score_clips(others, clips, shape_judge)
    )
    still = render(clips, 9)[:, :, :1].expand(-1, -1, 9, -1, -1)
    assert (judge_clips(still, shape_judge).motion == UNKNOWN).all()


def test_noise_and_empty_clips_are_not_taken_for_right(shape_judge):
    noise = torch.rand(4, 3, 9, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (judge_clips(noise, shape_judge).motion == UNKNOWN).all()
    empty = torch.full((2, 3, 9, 64, 64), -0.5)
    judgement = judge_clips(empty, shape_judge)
    assert (judgement.colour == UNKNOWN).all()
    assert (judgement.motion == UNKNOWN).all()


def test_too_little_movement_is_no_motion():
    time = torch.linspace(0, 1, 33)
    path = torch.stack([32 + 5 * time, 32 + 0 * time], -1)[
        None
    ]  # 5 pixels; the slowest clip moves 12.8
    assert judge_motion(path, 64).item() == UNKNOWN
    assert MOTIONS[judge_motion((path - 32) * 4, 64).item()] == "moving right"


def test_shape_judge_round_trip(tmp_path, shape_judge):
    save_shape_judge(shape_judge, tmp_path / "judge.safetensors")
    crops = torch.rand(8, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        load_shape_judge(tmp_path / "judge.safetensors")(crops),
        shape_judge(crops),
        atol=2e-2,
        rtol=2e-2,
    )


def test_wilson_interval_against_a_table():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I, method 3
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_judged_clips_cover_every_combination():
    for split, count in (("train", 173), ("heldout", 19)):
        clips = judged_clips(split, count)
        labels = torch.stack([clips.shape, clips.colour, clips.motion], 1).tolist()
        assert sorted(map(tuple, labels)) == combinations(split)


class _Drawing:
    """Stands in for a pipeline: draws what the prompt says, except that it always moves the wrong
    way."""

    def __init__(self, num_clips: int, num_heldout: int, backwards: bool) -> None:
        self.backwards = backwards
        self.transformer, self._execution_device = torch.nn.Identity(), "cpu"
        self.seeds: list[int] = []
        clips = [judged_clips("train", num_clips), judged_clips("heldout", num_heldout)]
        self.by_prompt = {text: c[i : i + 1] for c in clips for i, text in enumerate(c.captions())}

    def __call__(self, prompt, generator, num_frames, height, width, **_):
        self.seeds += [g.initial_seed() for g in generator]
        video = torch.cat([render(self.by_prompt[p], num_frames, height, width) for p in prompt])
        video = video.flip(2) if self.backwards else video
        return SimpleNamespace(frames=(video.permute(0, 2, 3, 4, 1).numpy() + 1) / 2)


@pytest.mark.parametrize("backwards", [False, True])
def test_report_of_a_pipeline(tmp_path, shape_judge, backwards):
    pipe = _Drawing(6, 4, backwards)
    report = judge_pipeline(
        pipe,
        num_clips=6,
        num_heldout=4,
        seed=0,
        batch_size=4,
        num_frames=9,
        shape_judge=shape_judge,
        progress=False,
    )
    assert pipe.seeds == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert [len(report["clips"]), report["summary"]["train"]["all"]["count"]] == [10, 6]
    rate = report["summary"]["all"]["motion"]["rate"]
    assert rate == (0.0 if backwards else 1.0)
    assert report["summary"]["all"]["colour"]["rate"] == 1.0
    write_report(report, tmp_path / "report.json", "a-drawing")
    text = (tmp_path / "report.json").read_text()
    assert '"model": "a-drawing"' in text
    assert str(tmp_path) not in text
    with pytest.raises(ValueError, match="name"):
        write_report(report, tmp_path / "report.json", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_clips", -1),
        ("batch_size", 0),
        ("guidance_scale", -1.0),
        ("seed", -2),
        ("num_frames", 0),
    ],
)
def test_bad_judge_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        judge_pipeline(None, **{name: value})


def test_nothing_to_judge():
    with pytest.raises(ValueError, match="num_heldout"):
        judge_pipeline(None, num_clips=0, num_heldout=0)
