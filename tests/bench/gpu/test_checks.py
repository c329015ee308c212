"""Checks of the GPU check, on the CPU: the formulas agree with the torch backend, and wrong results fail."""

import contextlib
import dataclasses
import functools

import pytest
import torch

from dit_accel.bench.gpu import checks, prefill, routing
from dit_accel.bench.gpu.device import Device
from dit_accel.bench.gpu.tolerance import errors


class Host(Device):
    """CPU device, on which the torch backend computes."""

    place = "cpu"

    def wait(self):
        pass

    @contextlib.contextmanager
    def poisoned(self):
        yield


def every(module):
    return pytest.mark.parametrize(
        "sub_step", [pytest.param(x, id=x.name) for x in module.sub_steps()]
    )


@pytest.mark.parametrize("check", [pytest.param(x, id=x.name) for x in checks.checks()])
def test_every_problem_passes_with_the_torch_backend(check, monkeypatch):
    """Sizes are smaller than on a GPU, with the same modes and rules, and several query and key blocks."""
    torch.manual_seed(0)
    monkeypatch.setattr(checks, "Q_LEN", 150)
    small = dataclasses.replace(check, kv_len=261)
    result = checks.run(small, Host(), {})
    assert result["passed"], result


@every(routing)
def test_router_and_selection_equal_themselves(sub_step):
    torch.manual_seed(0)
    assert sub_step.run(Host(), {})["passed"]


def test_query_sums_equal_themselves_in_single_precision():
    torch.manual_seed(0)
    result = prefill.check_sums(Host(), *prefill.SUMS["fp32, d=64"])
    assert result["passed"], result


def test_ids_are_unique():
    names = [x.id for module in (checks, routing, prefill) for x in module.sub_steps()]
    assert len(set(names)) == len(names)


def result_of(name):
    check = next(x for x in checks.checks() if x.name == name)
    torch.manual_seed(0)
    return checks.run(check, Host(), {})


@pytest.mark.parametrize("wrong", [1e-2, float("nan"), float("inf")])
def test_a_wrong_output_does_not_pass(monkeypatch, wrong):
    right = checks.block_sparse_attention

    def attend(*args, **kwargs):
        o, lse = right(*args, **kwargs)
        return torch.cat([o[..., :-1, :], o[..., -1:, :] + wrong], -2), lse

    monkeypatch.setattr(checks, "block_sparse_attention", attend)
    assert not result_of("none, fp32, d=64")["passed"]


def test_a_wrong_gradient_does_not_pass(monkeypatch):
    right = checks.sparse_linear_attention

    def attend(q, k, v, plan, **options):
        return right(q, k * 1.01 - 0.01 * k.detach(), v, plan, **options)

    monkeypatch.setattr(checks, "sparse_linear_attention", attend)
    result = result_of("proj complement, fp32, d=64")
    assert not result["passed"]
    error, allowed = result["errors"]["o"]
    assert error <= allowed


def test_results_that_do_not_repeat_do_not_pass(monkeypatch):
    calls = iter(range(10))
    right = checks.block_sparse_attention

    def attend(*args, **kwargs):
        o, lse = right(*args, **kwargs)
        return o + 1e-9 * next(calls), lse

    monkeypatch.setattr(checks, "block_sparse_attention", attend)
    result = result_of("none, fp32, d=64")
    assert not result["repeats"]
    assert not result["passed"]


@pytest.mark.parametrize("name", ["topk", "topk and skip", "threshold"])
def test_a_tie_that_goes_to_the_higher_index_does_not_pass(monkeypatch, name):
    right = routing.SparsePlan.from_scores
    seen = iter([True, False])

    def from_scores(scores, **options):
        if next(seen):
            scores = scores + 1e-3 * torch.arange(scores.shape[-1])
        return right(scores, **options)

    monkeypatch.setattr(routing.SparsePlan, "from_scores", from_scores)
    torch.manual_seed(0)
    result = routing.selection(Host(), **routing.SELECTIONS[name])
    assert result["passed"] == (name == "threshold")


def test_half_precision_may_err_twice_as_much_as_the_formula():
    exact = {"o": torch.linspace(-1, 1, 50, dtype=torch.float64)}
    plain = {"o": (exact["o"] + 0.01).half()}
    measure = functools.partial(errors, exact=exact, plain=plain)
    for distance, fits in ((0.015, True), (0.03, False)):
        error, allowed = measure({"o": (exact["o"] + distance).half()})["o"]
        assert (error <= allowed) == fits
