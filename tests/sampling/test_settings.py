"""Arguments of pipeline calls, and the numbers that runs start from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.sampling.settings import (
    LARGEST,
    SEEDS,
    Sampling,
    check_count,
    check_fps,
    check_seed,
)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LARGEST)
@pytest.mark.parametrize(
    "value", [0, -1, 10**12, 2**70, 1.5, math.nan, math.inf, "8", True], ids=repr
)
def test_whole_numbers_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", LARGEST)
def test_usual_numbers_pass(name):
    for value in (1, 512, LARGEST[name]):
        assert Sampling(**{name: value}).call_arguments() == {name: value}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "5", True], ids=repr)
def test_guidance_is_a_finite_number(value):
    with pytest.raises(ValueError, match="guidance_scale"):
        Sampling(guidance_scale=value)
    assert Sampling(guidance_scale=0).guidance_scale == 0


@pytest.mark.usefixtures("unchecked")
def test_negative_prompts_are_text():
    with pytest.raises(ValueError, match="negative_prompt=3"):
        Sampling(negative_prompt=3)
    assert Sampling(negative_prompt="").call_arguments() == {"negative_prompt": ""}


def test_copies_are_checked_too():
    plain = Sampling(height=64)
    with pytest.raises(ValueError, match="height=0"):
        plain.overridden(height=0)
    with pytest.raises(ValueError, match="width=-8"):
        plain.filled({"width": -8})
    assert plain.filled({"height": 32, "width": 16}) == Sampling(height=64, width=16)


@given(st.integers(0, SEEDS - 1), st.integers(1, 10**6))
def test_all_seeds_of_a_run_are_in_range(seed, count):
    if seed + count <= SEEDS:
        check_seed(seed, count)
    else:
        with pytest.raises(ValueError, match=f"seed={seed}"):
            check_seed(seed, count)


@pytest.mark.parametrize("value", [0.01, 1, 16, 23.976, 1000])
def test_usual_frame_rates_pass(value):
    check_fps(value)


@pytest.mark.usefixtures("unchecked")
def test_counts_without_an_upper_end():
    check_count("repeats", 10**9)
    with pytest.raises(ValueError, match="repeats=True"):
        check_count("repeats", True)
