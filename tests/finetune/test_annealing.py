"""The share of blocks that is read while sparsity is annealed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.finetune.annealing import topk_at

fractions = st.floats(0.001, 1)


@given(start=fractions, end=fractions, steps=st.integers(0, 50))
def test_it_goes_from_start_to_end_and_stays_there(start, end, steps):
    values = [topk_at(step, start=start, end=end, steps=steps) for step in range(steps + 3)]
    assert values[0] == (start if steps else end)
    assert values[steps:] == [end] * 3
    assert all(0 < x <= 1 for x in values)
    ordered = sorted(values, reverse=start > end)
    assert values == pytest.approx(ordered)


def test_each_step_changes_it_by_the_same_factor():
    values = [topk_at(step, start=0.8, end=0.05, steps=4) for step in range(5)]
    assert values == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.05])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": 0.0}, r"start=0.0: .*\(0, 1\]"),
        ({"end": 1.2}, r"end=1.2: .*\(0, 1\]"),
        ({"step": -1}, "step=-1: .*0"),
        ({"steps": -5}, "steps=-5: .*0"),
    ],
)
def test_other_numbers_are_refused(changed, message):
    options = {"step": 1, "start": 0.5, "end": 0.1, "steps": 3, **changed}
    with pytest.raises(ValueError, match=message):
        topk_at(options.pop("step"), **options)
