"""Selection kernel against the reference implementation: equal lists, bit for bit, under every rule."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan
from dit_accel.kernels.geometry import Geometry
from dit_accel.kernels.lists import Lists
from dit_accel.kernels.router import select_kernel, select_op
from dit_accel.kernels.router.criteria import Criteria

from ..kernels.plan_cases import geometries
from .cases import cases

CRITERIA = {
    "topk": {"topk": 0.3},
    "one": {"topk": 1e-9},
    "all": {"topk": 1.0},
    "top_p": {"top_p": 0.6},
    "everything": {"top_p": 1.0},
    "both": {"topk": 0.1, "top_p": 0.5},
    "threshold": {"threshold": 0.5},
    "limited": {"top_p": 0.9, "limit": 0.4},
    "limited threshold": {"threshold": -1.0, "limit": 0.4},
    "limited union": {"topk": 0.2, "top_p": 0.9, "limit": 0.3},
}


def random_scores(shape, kind, seed):
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(shape, generator=g)
    if kind == "ties":
        scores = scores.round() / 2
    if kind == "extremes":
        values = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, -torch.inf])
        scores = values[torch.randint(0, len(values), shape, generator=g)]
    return scores


def on_kernels(patched, scores, **options):
    """Return the plan that the kernel makes, with a poison value in unwritten memory."""

    def poisoned(*arguments):
        return tuple(x.fill_(-7) for x in empty(*arguments))

    empty = select_op._empty_lists
    patched.setattr(select_op, "_fits", lambda scores, rules: True)
    patched.setattr(select_op, "_empty_lists", poisoned)
    return SparsePlan.from_scores(scores, **options)


@settings(max_examples=cases(8), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    geometry=geometries(100, blocks=(16, 32)), criterion=st.sampled_from(list(CRITERIA)),
    skip=st.sampled_from([0.0, 0.01, 0.2, 0.7]), sink_blocks=st.integers(0, 2),
    tail_blocks=st.integers(0, 2), diagonal=st.sampled_from([None, 0, 1]),
    kind=st.sampled_from(["continuous", "ties", "extremes"]), shuffled=st.booleans(),
    heads=st.integers(1, 2), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_lists_equal_the_definition(
    geometry, criterion, skip, sink_blocks, tail_blocks, diagonal, kind, shuffled, heads, seed
):
    n_q, n_k = (
        -(-geometry[n] // geometry[b]) for n, b in (("q_len", "block_q"), ("kv_len", "block_k"))
    )
    tail_blocks = min(tail_blocks, n_k - 1)
    if shuffled and "q_block_sizes" not in geometry:
        g = torch.Generator().manual_seed(seed)
        order = [torch.randperm(geometry["q_len"], generator=g) for _ in range(heads)]
        geometry["q_order"] = torch.stack(order)
    batch = len(geometry.get("kv_lengths", [0])) if seed % 2 else 1
    scores = random_scores((batch, heads, n_q, n_k - tail_blocks), kind, seed)
    options = {
        **CRITERIA[criterion], **geometry, "skip": skip, "sink_blocks": sink_blocks,
        "tail_blocks": tail_blocks, "diagonal": diagonal,
    }  # fmt: skip
    tallies = [None, None]
    if not geometry.get("causal"):
        tallies = [torch.tensor([1, 10, 100]) for _ in range(2)]
        options["dense_queries"] = seed % 5
    expected = SparsePlan.from_scores(scores, tally=tallies[0], **options)
    with pytest.MonkeyPatch.context() as patched:
        actual = on_kernels(patched, scores, tally=tallies[1], **options)
    assert actual.equals(expected)
    if tallies[0] is not None:
        assert torch.equal(*tallies)


@pytest.mark.parametrize(
    ("criterion", "filler"),
    [
        *(
            (x, filler)
            for x in ("topk", "top_p", "threshold")
            for filler in (-torch.inf, torch.inf)
        ),
        *((x, torch.nan) for x in CRITERIA),
    ],
)
def test_rows_without_a_finite_score(criterion, filler, monkeypatch):
    scores = torch.full((1, 1, 3, 6), -torch.inf)
    scores[0, 0, 1, ::2], scores[0, 0, 2] = filler, filler
    options = {"block_q": 16, "block_k": 16, "q_len": 40, "kv_len": 90, **CRITERIA[criterion]}
    expected = SparsePlan.from_scores(scores, skip=0.3, **options)
    assert on_kernels(monkeypatch, scores, skip=0.3, **options).equals(expected)


@pytest.mark.parametrize("n", [600, 2100])
def test_long_rows(n, monkeypatch):
    scores = random_scores((1, 1, 2, n), "ties", 3)
    options = {"block_q": 16, "block_k": 16, "q_len": 20, "kv_len": 16 * n - 5, "top_p": 0.7}
    expected = SparsePlan.from_scores(scores, skip=0.3, **options)
    assert on_kernels(monkeypatch, scores, skip=0.3, **options).equals(expected)


def test_a_row_that_does_not_fit_one_program_is_selected_in_torch(monkeypatch):
    monkeypatch.setattr(select_op, "runs_here", lambda x: True)
    monkeypatch.setattr(select_kernel, "MOST_BLOCKS", 4)
    monkeypatch.setattr(select_kernel, "select_launch", None)  # would fail if it was called
    scores = random_scores((1, 1, 2, 5), "ties", 3)
    options = {"block_q": 16, "block_k": 16, "q_len": 20, "kv_len": 80, "topk": 0.5}
    SparsePlan.from_scores(scores, **options)


def test_a_list_that_is_too_narrow_writes_nothing_beside_it():
    n = 40
    scores = random_scores((1, 1, 1, n), "continuous", 1)
    geometry = {"block_q": 16, "block_k": 16, "q_len": 16, "kv_len": 16 * n}
    memory = torch.full((20,), -7, dtype=torch.int32)
    lists = [
        Lists(torch.zeros(1, 1, 1, dtype=torch.int32), x.view(1, 1, 1, -1))
        for x in (memory[3:4], memory[8:13])
    ]
    rules = Geometry.of("cpu", **geometry)
    select_kernel.select_launch(scores, rules, Criteria(best=9), *lists, None)()
    assert (memory[torch.tensor([0, 1, 2, 4, 5, 6, 7, *range(13, 20)])] == -7).all()
