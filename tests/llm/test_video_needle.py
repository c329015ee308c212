"""A needle in one frame of a video: dense attention finds it, windows do not, patterns for videos know the frames."""

import random

import pytest
import torch

from dit_accel import llm
from dit_accel.llm.bench.retrieval import FRAME, LEAD, accuracy, video_needle
from dit_accel.llm.bench.wired import KEYS, wired_model
from dit_accel.llm.prefill.boundary import Boundary
from dit_accel.llm.prefill.grid import Grid
from dit_accel.llm.spans import given_spans

SMALL = {"dense_layers": 0, "crossover": 0}
DEPTHS = (0.0, 0.3, 0.7, 1.0)


@pytest.fixture(scope="module")
def wired():
    return wired_model()


def found(model, length, depth):
    """Return whether the model finds a needle at this depth."""
    question = video_needle(length, random.Random(f"{length} {depth}"), depth)
    with torch.inference_mode(), given_spans(model, [question.spans]):
        logits = model(torch.tensor([question.ids]), use_cache=False).logits[0]
    return logits[question.positions].argmax(-1).tolist() == question.answers


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_lies_in_its_frame(depth):
    question = video_needle(2_000, random.Random(0), depth)
    starts = [start for start, _, _ in question.spans]
    assert starts == list(range(LEAD, LEAD + FRAME * len(starts), FRAME))
    assert all((stop - start, name) == (FRAME, "video") for start, stop, name in question.spans)
    assert 1_200 < question.spans[-1][1] <= 1_334
    keys = [i for i, token in enumerate(question.ids) if token < KEYS]
    frame = round(depth * (len(starts) - 1))
    assert starts[frame] <= keys[0] < starts[frame] + FRAME - 1
    assert keys[1:] == question.positions == [1_999]
    assert question.answers == [question.ids[keys[0] + 1]]


@pytest.mark.parametrize("length", [1_000, 2_001])
def test_dense_attention_finds_it_at_every_depth(wired, length):
    llm.disable(wired)
    assert all(found(wired, length, depth) for depth in DEPTHS)


@pytest.mark.parametrize("length", [1_000, 2_001])
def test_a_window_does_not(wired, length):
    llm.enable(wired, prefill={**SMALL, "pattern": "a_shape", "options": {"window": 256}})
    assert not any(found(wired, length, depth) for depth in DEPTHS)


@pytest.mark.parametrize(("name", "kind"), [("grid", Grid), ("boundary", Boundary)])
def test_patterns_for_videos_know_the_frames(wired, name, kind, monkeypatch):
    plan, seen = kind.plan, []

    def note(self, prompt):
        seen.append(prompt.spans)
        return plan(self, prompt)

    monkeypatch.setattr(kind, "plan", note)
    llm.enable(wired, prefill={**SMALL, "pattern": name})
    assert all(found(wired, 2_000, depth) for depth in DEPTHS)
    assert accuracy(wired, "video_needle", 2_000, prompts=1) == 1
    assert all(spans[0][0] == (LEAD, LEAD + FRAME, "video") for spans in seen)
    assert len(seen) == 2 * (len(DEPTHS) + 1)
    assert llm.summary(wired).layers[1].density < 1
