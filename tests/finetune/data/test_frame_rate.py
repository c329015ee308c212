"""Resampling to a constant frame rate."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.finetune.data.frame_rate import Timed, resample


def frames(times, last=Fraction(0)):
    """Numbered frames at times in seconds; `last` is the duration of the last one."""
    times = [Fraction(x) for x in times]
    ends = [*times[1:], times[-1] + last]
    return [(Timed(a, b - a), i) for i, (a, b) in enumerate(zip(times, ends, strict=True))]


def constant(count, fps):
    return frames([Fraction(i, fps) for i in range(count)], Fraction(1, fps))


@pytest.mark.parametrize(
    ("source", "fps", "expected"),
    [
        (constant(6, 30), 30, [0, 1, 2, 3, 4, 5]),
        (constant(12, 30), 10, [0, 3, 6, 9]),
        (constant(10, 25), 5, [0, 5]),
        (constant(3, 10), 20, [0, 0, 1, 1, 2, 2]),
        (constant(9, 24), 16, [0, 1, 3, 4, 6, 7]),
        (constant(4, 30), None, [0, 1, 2, 3]),
        (frames([0, Fraction(1, 2), Fraction(3, 2)], Fraction(1, 2)), 2, [0, 1, 1, 2]),
    ],
    ids=["same", "a third", "a fifth", "twice", "24 to 16", "as they are", "variable"],
)
def test_frames_are_repeated_or_left_out(source, fps, expected):
    assert list(resample(source, fps)) == expected


@pytest.mark.parametrize("base", [1000, 90000], ids=["milliseconds", "mpeg clock"])
@pytest.mark.parametrize("fps", [24, 30, Fraction(30000, 1001), 50, 60])
def test_rounded_times_lose_no_frame(base, fps):
    times = [Fraction(round(i / fps * base), base) for i in range(300)]
    assert list(resample(frames(times, 1 / Fraction(fps)), float(fps))) == list(range(300))


def test_parts_of_a_video():
    source = [(Timed(x.time - 1, x.duration), i) for x, i in constant(30, 10)]
    assert list(resample(source, 10)) == list(range(10, 30))
    assert list(resample(source, 10, 0.5)) == [10, 11, 12, 13, 14]
    assert list(resample(source, None, 0.3)) == [10, 11, 12]
    assert list(resample(source, 5, 0.4)) == [10, 12]


def test_a_frame_without_duration_is_one_frame():
    assert list(resample([(Timed(Fraction(0), Fraction(0)), "x")], 16)) == ["x"]
    assert list(resample([], 16)) == []


def test_a_late_first_frame_is_repeated_up_to_its_time():
    assert list(resample(frames([1, 2], 1), 2)) == [0, 0, 0, 0, 1, 1]


@given(
    gaps=st.lists(st.fractions(Fraction(1, 100), 1), min_size=1, max_size=20),
    fps=st.integers(1, 60),
)
def test_each_output_frame_is_the_one_that_a_player_shows(gaps, fps):
    times = [sum(gaps[:i], Fraction(0)) for i in range(len(gaps))]
    shown = list(resample(frames(times, gaps[-1]), fps))
    assert shown == sorted(shown)
    total = sum(gaps)
    assert abs(len(shown) - total * fps) <= Fraction(5, 4)
    for i, frame in enumerate(shown):
        forgiven = Fraction(1, 4 * fps)
        # The frame has begun, and the next one has not.
        assert times[frame] <= Fraction(i, fps) + forgiven
        if frame + 1 < len(times):
            assert times[frame + 1] > Fraction(i, fps) - Fraction(1, fps)
