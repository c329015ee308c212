"""Bounds and summary of a run."""

import pytest

from dit_accel.bench.gpu.bounds import BOUNDS, verdicts
from dit_accel.bench.gpu.cases import WAN
from dit_accel.bench.gpu.report import markdown
from dit_accel.bench.gpu.speed import ratios

NONE = f"speed/{WAN.name}, 5%, none"


def test_a_run_without_figures_measures_no_bound():
    assert {x["verdict"] for x in verdicts({})} == {"not measured"}
    # flash was refused, so that there is nothing to compare with
    refused = {NONE: {"ratios": {"kernel": {"tflops": 300.0}, "graph": {}}}}
    assert {x["verdict"] for x in verdicts(refused)} == {"not measured"}


@pytest.mark.parametrize(("speed", "verdict"), [(22.0, "met"), (21.9, "missed")])
def test_a_bound_is_met_at_its_value(speed, verdict):
    found = verdicts({NONE: {"ratios": {"kernel": {"x_flash": speed}}}})
    assert found[0]["verdict"] == verdict
    assert found[0]["value"] == speed


def test_bounds_are_of_sub_steps_that_exist():
    from dit_accel.bench.gpu.steps import first_measurements

    assert {x.sub_step for x in BOUNDS} <= {x.id for x in first_measurements()}


def test_ratios():
    times = {
        name: {"p20": x, "p50": x, "p80": x}
        for name, x in (
            ("flash", 20.0),
            ("dense triton", 25.0),
            ("kernel", 1.0),
            ("eager", 2.0),
            ("plan", 0.1),
        )
    }
    found = ratios(
        {**times, "refused": {"cudnn": "no"}},
        flops=1e12,
        shares={"eager": 0.1, "plan": 0.0},
        density=0.05,
    )
    assert found["kernel"]["x_flash"] == 20
    assert found["kernel"]["of_yardstick"] == pytest.approx(1.25)
    assert found["kernel"]["tflops"] == pytest.approx(50)
    assert "plan" not in found
    assert found["eager"]["of_yardstick"] == pytest.approx(1.25)
    assert found["flash"]["tflops"] == pytest.approx(50)
    assert found["flash"]["of_yardstick"] == pytest.approx(1.25)


def test_summary_names_what_went_wrong():
    steps = {
        "checks/none": {"status": "done", "result": {"passed": True}},
        "checks/causal": {
            "status": "done",
            "result": {"passed": False, "repeats": True, "errors": {"o": [1.0, 0.1]}},
        },
        "speed/x": {"status": "failed", "error": "OutOfMemoryError: too much"},
        "flex/none": {"status": "skipped", "reason": "needs about 30 s, 2 s left"},
    }
    text = markdown({"device": "some GPU", "capability": "9.0", "steps": steps})
    assert "1 of 2 problems passed" in text
    assert "causal: {'o': '1 > 0.1'}" in text
    assert "OutOfMemoryError: too much" in text
    assert "needs about 30 s" in text
