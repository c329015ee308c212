from types import SimpleNamespace

import pytest
import torch

from dit_accel.bench.train_judge import train_shape_judge
from dit_accel.demo.clips import describe_clips, render
from dit_accel.demo.judge import (
    UNKNOWN,
    ShapeJudge,
    judge_clips,
    judge_motion,
    load_shape_judge,
)
from dit_accel.demo.report import judge_pipeline, judged_clips, score_clips, summarise
from dit_accel.demo.vocabulary import MOTIONS, combinations
from dit_accel.sampling.settings import Sampling


@pytest.fixture(scope="module")
def shape_judge() -> ShapeJudge:
    return load_shape_judge()


@pytest.mark.parametrize(
    ("frames", "height", "width", "trained"),
    [(17, 64, 64, False), (9, 64, 96, True)],
    ids=["17x64x64, committed", "9x64x96, trained now"],
)
def test_every_combination_is_recognised_on_clean_clips(
    shape_judge, frames, height, width, trained
):
    clips = describe_clips(combinations("all"), torch.Generator().manual_seed(2))
    judge = train_shape_judge(seed=0, steps=120) if trained else shape_judge
    judgement = judge_clips(render(clips, frames, height, width), judge)
    for name in ("colour", "motion", "background"):
        assert torch.equal(getattr(judgement, name), getattr(clips, name)), name
    assert (judgement.shape == clips.shape).float().mean() >= (0.98 if trained else 1.0)


def test_training_of_the_shape_judge_is_reproducible():
    first, second = (train_shape_judge(seed=1, steps=3, batch_size=4) for _ in range(2))
    other = train_shape_judge(seed=2, steps=3, batch_size=4)
    crops = torch.rand(8, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(crops), second(crops))
    assert not torch.equal(first(crops), other(crops))


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


def test_shares_have_wilson_intervals():
    records = [{"right": {"shape": i < 81, "background": None}} for i in range(263)]
    found = summarise(records)
    # Newcombe 1998, table I, method 3
    assert found["shape"]["interval_95"] == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert found["background"] == {"right": 0, "count": 0, "rate": None, "interval_95": [0, 1]}


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


SMALL = Sampling(num_frames=9, height=64, width=64, num_inference_steps=12, guidance_scale=2.0)


@pytest.mark.parametrize("backwards", [False, True])
def test_report_of_a_pipeline(shape_judge, backwards):
    pipe = _Drawing(6, 4, backwards)
    report = judge_pipeline(
        pipe,
        SMALL,
        num_clips=6,
        num_heldout=4,
        seed=0,
        batch_size=4,
        shape_judge=shape_judge,
        progress=False,
    )
    assert pipe.seeds == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert [len(report["clips"]), report["summary"]["train"]["all"]["count"]] == [10, 6]
    rate = report["summary"]["all"]["motion"]["rate"]
    assert rate == (0.0 if backwards else 1.0)
    assert report["summary"]["all"]["colour"]["rate"] == 1.0
    assert report["settings"]["num_frames"] == 9


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_clips", -1), ("batch_size", 0), ("guidance_scale", -1.0), ("seed", -2), ("height", 8)],
)
def test_bad_judge_arguments_are_named(name, value):
    arguments = {name: value}
    sampling = SMALL
    if hasattr(SMALL, name):
        sampling, arguments = SMALL.overridden(**arguments), {}
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        judge_pipeline(None, sampling, **arguments)


def test_nothing_to_judge():
    with pytest.raises(ValueError, match="num_heldout=0"):
        judge_pipeline(None, SMALL, num_clips=0, num_heldout=0)
