"""Error control: the transformer runs if the error of a forecast is too large, and on as many tokens as necessary."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dit_accel
from dit_accel.config import RASConfig
from dit_accel.ras.control import LONGEST, LONGEST_FROM_31, ErrorControl, fewest_tiles
from dit_accel.ras.selection import rank_by
from dit_accel.ras.tile_selection import TileSelection

from ..random_pipelines import FAMILIES, make, relative, run
from .test_reference_failures import HostReads

every_family = pytest.mark.parametrize("family", FAMILIES)
whole_and_tokens = pytest.mark.parametrize("more", [{}, {"ratio": 0.5}], ids=["whole", "tokens"])


def modes(pipe):
    return [x.mode for x in dit_accel.summary(pipe).ras.steps]


@whole_and_tokens
@every_family
def test_no_tolerance_runs_every_step(family, more):
    pipe = make(family)
    plain = run(pipe, family, steps=7)
    dit_accel.enable(pipe, ras={"control": 1e-9, **more})
    with pytest.warns(UserWarning, match=r"ras: .*tolerance"):
        torch.testing.assert_close(run(pipe, family, steps=7), plain, rtol=0, atol=0)
    report = dit_accel.summary(pipe).ras
    assert report.dense_calls["predicted error above the tolerance"] > 0


@whole_and_tokens
@pytest.mark.parametrize(
    ("family", "steps", "longest"),
    [*((x, 9, LONGEST) for x in FAMILIES), ("wan", 34, LONGEST_FROM_31)],
)
def test_any_tolerance_leaves_out_as_much_as_it_may(family, more, steps, longest):
    pipe = make(family)
    dit_accel.enable(pipe, ras={"control": 1e9, **more})
    run(pipe, family, steps=steps)
    runs = "".join({"dense": "F", "forecast": "-"}[x] for x in modes(pipe))
    assert runs.startswith("FFF" + "-" * longest + "F")
    assert "-" * (longest + 1) not in runs
    assert runs.endswith("FF")


@whole_and_tokens
@every_family
def test_a_larger_tolerance_costs_less_and_errs_more(family, more):
    pipe = make(family)
    plain = run(pipe, family, steps=12)
    costs, errors = [], []
    for tolerance in (1e-9, 2e-3, 1e9):
        dit_accel.enable(pipe, ras={"control": tolerance, **more})
        errors.append(relative(run(pipe, family, steps=12), plain))
        costs.append(dit_accel.summary(pipe).ras.cost)
    assert 11.5 < costs[0] <= 12  # with partial steps, what a prompt alone decides is computed once
    assert costs == sorted(costs, reverse=True)
    assert errors[0] == 0
    assert errors[2] > 0


@every_family
def test_a_batch_gives_what_single_runs_give(family, monkeypatch):
    """Samples may decide differently: the call runs for one sample, and the other one keeps its forecast."""
    pipe = make(family)
    plain = run(pipe, family, (0, 1), steps=9)
    own = max(relative(run(pipe, family, (i,), steps=9)[0], plain[i]) for i in (0, 1))
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
    run(pipe, family, (0, 1), steps=9)
    # Between the predictions for the two samples, at the first step that may be a forecast.
    dit_accel.enable(pipe, ras={"control": (predicted[0][0] + predicted[0][1]) / 2})
    both = run(pipe, family, (0, 1), steps=9)
    assert len(set(chosen[3][:2])) == 2
    for i in (0, 1):
        assert relative(run(pipe, family, (i,), steps=9)[0], both[i]) < max(10 * own, 1e-5)


@every_family
def test_the_tokens_with_the_largest_predicted_errors_run(family, monkeypatch):
    """Between two dense steps, the smallest number of tiles runs that keeps all others below the tolerance."""
    pipe = make(family)
    seen = []
    begin = TileSelection.begin_step

    def noting(self, step, metric, level=None):
        if step != self.step:
            errors = self.errors * (self.updated - level).square() * self.weights[step] ** 2
            begin(self, step, metric, level)
            seen.append((step, errors, self.tiles, self.schedule))
        else:
            begin(self, step, metric, level)

    monkeypatch.setattr(TileSelection, "begin_step", noting)

    def sample(tolerance):
        seen.clear()
        dit_accel.enable(pipe, ras={"control": tolerance, "ratio": 0.5})
        return run(pipe, family, steps=9)

    sample(1e9)
    step, errors, tiles, schedule = next(x for x in seen if x[2] is not None)
    assert tiles.shape[1] == 0
    few, many = schedule.choices
    ranked = errors.sort(dim=1, descending=True).values
    left = [float((ranked[:, n:].sum(1) / errors.shape[1]).sqrt().max()) for n in (0, few, many)]
    for tolerance, count in ((left[0] * 0.99, few), (left[1] * 0.99, many), (left[2] * 0.99, None)):
        sample(tolerance)
        _, errors, tiles, _ = next(x for x in seen if x[0] == step)
        if count is None:
            assert tiles is None
            continue
        assert tiles.shape[1] == count
        worst = errors.argsort(dim=1, descending=True, stable=True)[:, :count]
        assert torch.equal(tiles, worst.sort(dim=1).values)
    report = next(x for x in dit_accel.summary(pipe).ras.steps if x.step == step)
    assert set(report.dense_calls) == {"predicted error above the tolerance"}


@given(data=st.data())
def test_fewest_tiles_is_the_first_choice_that_fits(data):
    samples, tiles = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    errors = torch.rand(samples, tiles, generator=generator, dtype=torch.float64)
    choices = tuple(sorted({0, *data.draw(st.lists(st.integers(0, tiles), max_size=3))}))
    tolerance = data.draw(st.floats(0, 1))
    fitting = []
    for n in choices:
        rest = [sorted(row, reverse=True)[n:] for row in errors.tolist()]
        if all((sum(x) / tiles) ** 0.5 <= tolerance for x in rest):
            fitting.append(n)
    found = fewest_tiles(errors, rank_by(errors), choices, tolerance)
    assert found == (fitting[0] if fitting else None)


def test_one_number_is_read_in_each_step():
    counts = []
    for ras in (
        {"budget": 0.7},
        {"control": 0.05},
        {"budget": 0.7, "ratio": 0.5},
        {"control": 0.05, "ratio": 0.5},
    ):
        pipe = make("wan")
        dit_accel.enable(pipe, ras=ras)
        with HostReads() as reads:
            run(pipe, "wan", steps=16)
        counts.append(reads.count)
    # The first three and the last two are dense anyway. With tokens, no two neighbours are decided.
    assert counts[1] - counts[0] == 16 - 5
    assert 0 < counts[3] - counts[2] <= 16 - 5


@pytest.mark.parametrize("control", [0, -1.0, float("inf"), float("nan"), True])
def test_bad_tolerances_are_refused_by_name(control):
    with pytest.raises(ValueError, match="control"):
        RASConfig(control=control)


def test_what_control_does_not_go_with_is_refused_by_name():
    with pytest.raises(ValueError, match=r"control=0\.1.*budget"):
        RASConfig(control=0.1, budget=0.5)
    with pytest.raises(ValueError, match=r"ratio=.*control"):
        RASConfig(control=0.1, ratio=[(0, 0.5), (0.5, 0.25)])
