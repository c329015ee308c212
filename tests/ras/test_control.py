"""Error control: the transformer runs where a forecast would be too wrong."""

import pytest
import torch

import dit_accel
from dit_accel.config import RASConfig
from dit_accel.ras.control import LONGEST, LONGEST_FROM_31, ErrorControl

from ..random_pipelines import FAMILIES, make, relative, run
from .test_reference_failures import HostReads

every_family = pytest.mark.parametrize("family", FAMILIES)


def modes(pipe):
    return [x.mode for x in dit_accel.summary(pipe).ras.steps]


@every_family
def test_no_tolerance_runs_every_step(family):
    pipe = make(family)
    plain = run(pipe, family)
    dit_accel.enable(pipe, ras={"control": 1e-9})
    with pytest.warns(UserWarning, match="predicted error above the tolerance"):
        torch.testing.assert_close(run(pipe, family), plain, rtol=0, atol=0)
    report = dit_accel.summary(pipe).ras
    assert report.dense_calls["predicted error above the tolerance"] > 0


@every_family
@pytest.mark.parametrize(("steps", "longest"), [(12, LONGEST), (34, LONGEST_FROM_31)])
def test_any_tolerance_leaves_out_as_much_as_it_may(family, steps, longest):
    pipe = make(family)
    dit_accel.enable(pipe, ras={"control": 1e9})
    run(pipe, family, steps=steps)
    runs = "".join({"dense": "F", "forecast": "-"}[x] for x in modes(pipe))
    assert runs.startswith("FFF" + "-" * longest + "F")
    assert "-" * (longest + 1) not in runs
    assert runs.endswith("FF")


@every_family
def test_a_larger_tolerance_costs_less_and_errs_more(family):
    pipe = make(family)
    plain = run(pipe, family, steps=16)
    costs, errors = [], []
    for tolerance in (1e-9, 2e-3, 1e9):
        dit_accel.enable(pipe, ras={"control": tolerance})
        errors.append(relative(run(pipe, family, steps=16), plain))
        costs.append(dit_accel.summary(pipe).ras.cost)
    assert costs[0] == 16
    assert costs == sorted(costs, reverse=True)
    assert errors[0] == 0
    assert errors[2] > 0


@every_family
def test_a_batch_gives_what_single_runs_give(family, monkeypatch):
    """Samples that decide differently: the call runs for one, and the other keeps its forecast."""
    pipe = make(family)
    plain = run(pipe, family, (0, 1), steps=16)
    own = max(relative(run(pipe, family, (i,), steps=16)[0], plain[i]) for i in (0, 1))
    chosen, predicted = {}, []
    begin = ErrorControl.begin_step

    def noting(self, step, level, *, dense):
        if step != self.step and not dense:
            error = self.rate.sqrt() * (self.updated - level).abs() * self.weights[step]
            predicted.append(error.tolist())
        begin(self, step, level, dense=dense)
        if self.runs is not None:
            chosen[step] = self.runs.tolist()

    monkeypatch.setattr(ErrorControl, "begin_step", noting)
    dit_accel.enable(pipe, ras={"control": 1e9})
    run(pipe, family, (0, 1), steps=16)
    # Between the predictions for the two samples, at the first step that may be a forecast.
    dit_accel.enable(pipe, ras={"control": (predicted[0][0] + predicted[0][1]) / 2})
    both = run(pipe, family, (0, 1), steps=16)
    assert len(set(chosen[3][:2])) == 2
    for i in (0, 1):
        assert relative(run(pipe, family, (i,), steps=16)[0], both[i]) < max(10 * own, 1e-5)


def test_one_number_is_read_in_each_step():
    counts = []
    for ras in ({"budget": 0.7}, {"control": 0.05}):
        pipe = make("wan")
        dit_accel.enable(pipe, ras=ras)
        with HostReads() as reads:
            run(pipe, "wan", steps=16)
        counts.append(reads.count)
    assert counts[1] - counts[0] == 16 - 5  # the first three and the last two are dense anyway


@pytest.mark.parametrize("control", [0, -1.0, float("inf"), float("nan"), True])
def test_bad_tolerances_are_refused_by_name(control):
    with pytest.raises(ValueError, match="control"):
        RASConfig(control=control)


@pytest.mark.parametrize("other", [{"budget": 0.5}, {"ratio": 0.5}])
def test_control_stands_alone(other):
    with pytest.raises(ValueError, match=r"control=0\.1: accepted without budget and ratio"):
        RASConfig(control=0.1, **other)
