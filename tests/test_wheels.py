"""`kernels/wheels.txt`: what a GPU machine without network is given."""

from importlib import metadata

import pytest

from .installed import BARE, ROOT, canonical, needed


def pins(file):
    lines = (ROOT / file).read_text().splitlines()
    return dict(
        (canonical(name), version)
        for name, _, version in (x.partition("==") for x in lines if x and not x.startswith("#"))
    )


def test_pins_are_those_of_the_constraints():
    ours, theirs = pins("kernels/wheels.txt"), pins("constraints.txt")
    common = ours.keys() & theirs.keys()
    assert {"diffusers", "transformers", "pytest", "hypothesis"} <= common
    assert {x: ours[x] for x in common} == {x: theirs[x] for x in common}


@pytest.mark.parametrize(
    "roots", [("pytest", "pytest-xdist", "hypothesis"), ("dit-accel",), ("torchmetrics", "scipy")]
)
def test_everything_needed_is_listed_and_nothing_that_the_machine_has(roots):
    if metadata.version("transformers") != pins("constraints.txt")["transformers"]:
        pytest.skip("other versions than those of constraints.txt need other packages")
    had, listed = needed(BARE), pins("kernels/wheels.txt").keys()
    assert needed(roots) - had - {"dit-accel"} <= listed
    assert not set(BARE) & listed
