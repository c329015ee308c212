"""Number of launches of a sparse call on a GPU, and absence of synchronisations that a CUDA graph cannot capture."""

import pytest
import torch

from dit_accel.bench import launches
from dit_accel.bench.launches import BOUNDS, MODES, ROUTERS, Shape, count, recording, sparse_call
from dit_accel.kernels import router

every_mode = pytest.mark.parametrize("mode", MODES)
every_router = pytest.mark.parametrize("name", ROUTERS)


@pytest.fixture(autouse=True)
def plain_allocations(monkeypatch):
    """Turn off the NaN fill of conftest.py, which would count as operators."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(function, "__wrapped__", function))


@every_router
def test_router_and_plan_are_four_launches_and_nothing_else(name):
    _, plan = count(Shape(), "marginal", name)
    assert plan.launches == ["pool_kernel"] * 2 + ["scores_kernel", "select_kernel"]
    assert plan.ops == []


@every_router
@pytest.mark.parametrize("mode", BOUNDS)
def test_a_call_starts_no_more_than_it_may(mode, name):
    call, _ = count(Shape(), mode, name)
    assert 5 <= call.total <= BOUNDS[mode]


@every_router
@every_mode
def test_nothing_waits_for_the_device(mode, name):
    call, _ = count(Shape(length=3000, head_dim=64, batch=2), mode, name)
    assert call.syncs == []
    assert "forward_kernel" in call.launches


def test_rows_that_fit_no_kernel_wait_for_nothing_either(monkeypatch):
    from dit_accel.kernels.router import select_kernel

    monkeypatch.setattr(select_kernel, "MOST_BLOCKS", 4)
    call, _ = count(Shape(length=3000), "marginal", "mean")
    assert call.syncs == []
    assert "select_kernel" not in call.launches
    assert "topk" in call.ops


WAITS = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "bool": (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "cpu": (lambda x: x.cpu(), "_to_copy"),
    "copy_": (lambda x: torch.zeros(x.shape).copy_(x), "copy_"),
    "mask": (lambda x: x[x > 0], "index"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "new tensor": (lambda x: torch.tensor([1.0, 2.0], device=x.device), "tensor"),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_for_the_device_is_found(what, monkeypatch):
    """The tests above fail if one of these operations is added to a call."""
    wait, name = WAITS[what]

    def waiting(*args, **options):
        scores = router.block_scores(*args, **options)
        wait(scores)
        return scores

    monkeypatch.setattr(launches, "block_scores", waiting)
    call, _ = count(Shape(length=3000), "none", "mean")
    assert call.syncs == [name]
    assert "select_kernel" not in call.launches


def test_torch_operators_are_counted_but_no_views_and_allocations():
    x = torch.empty(4, 6, device="meta")
    with recording() as started:
        y = x.view(2, 12).t()[None].expand(3, -1, -1)
        y = torch.empty_like(y) + x.new_empty(())
        y.add_(1)
        y.sum()
        torch.zeros(3, device="meta")
    assert started.ops == ["add", "add_", "sum", "zeros"]


def test_operators_inside_of_the_packages_own_are_counted():
    call, _ = count(Shape(), "complement", "mean")
    assert call.ops == ["_to_copy"]  # the projection, in the dtype of q


def test_a_call_on_the_gpu_path_computes_nothing_but_has_the_right_shape():
    call, plan = sparse_call(Shape(length=500), "alpha", "spread", "meta")
    with recording():
        o, made = call(), plan()
    assert o.shape == (1, 12, 500, 128)
    assert made.kv_indices.shape == (1, 12, 4, 1)
    assert made.full_kv_indices.shape == (1, 12, 4, 1)
    assert made.row_bound == 1
