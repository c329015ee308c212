import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

from dit_accel.kernels import SparsePlan, lists
from dit_accel.kernels.lists import block_mask

from .plan_cases import (
    DENSITIES,
    dense_mask,
    geometries,
    masks,
    random_block_mask,
    visible_pairs,
)

SQUARE = {"block_q": 16, "block_k": 16, "q_len": 64, "kv_len": 64}
MASK = torch.ones(1, 1, 4, 4, dtype=torch.bool)
seeds = st.integers(0, 2**16)
heads = st.sampled_from([1, 3])


def all_blocks(**geometry) -> SparsePlan:
    n_q, n_k = (
        -(-geometry[n] // geometry[b]) for n, b in (("q_len", "block_q"), ("kv_len", "block_k"))
    )
    return SparsePlan.from_block_mask(torch.ones(1, 1, n_q, n_k, dtype=torch.bool), **geometry)


def plan_of(scores: list[list[float]], **options) -> SparsePlan:
    """Return a plan with blocks of one token, so that blocks and tokens are the same."""
    x = torch.tensor(scores)[None, None]
    sizes = {"block_q": 1, "block_k": 1, "q_len": x.shape[2], "kv_len": x.shape[3]}
    return SparsePlan.from_scores(x, **sizes, **options)


def kept(plan: SparsePlan) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in plan.to_block_mask()[0, 0]]


def skipped(plan: SparsePlan) -> list[list[int]]:
    mask = block_mask(plan.skip_num_blocks, plan.skip_indices, plan.num_k_blocks)
    return [row.nonzero().flatten().tolist() for row in mask[0, 0]]


def random_scores(geometry: dict, seed: int) -> torch.Tensor:
    """Return scores with few distinct numbers, so that rows have ties."""
    mask = random_block_mask(geometry, 0.5, (1, 1), seed)
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, mask.shape, generator=g).float()


# -- what a plan means -----------------------------------------------------------------------------


@settings(max_examples=80)
@given(masks(200))
def test_dense_mask_is_blocks_and_columns_under_the_visibility_rules(case):
    mask, geometry = case
    plan = SparsePlan.from_block_mask(mask, **geometry)
    assert torch.equal(plan.to_dense_mask(), dense_mask(mask, geometry))


@given(geometries(200), st.sampled_from(DENSITIES), heads, seeds)
def test_lists_are_disjoint_ascending_and_hold_the_blocks_that_show_a_key(
    geometry, density, n_heads, seed
):
    mask = random_block_mask(geometry, density, (1, n_heads), seed)
    plan = SparsePlan.from_block_mask(mask, **geometry)
    rows = {}
    for kind in ("kv", "full_kv"):
        counts, indices = getattr(plan, f"{kind}_num_blocks"), getattr(plan, f"{kind}_indices")
        assert counts.dtype == indices.dtype == torch.int32
        listed = [
            row[:n].tolist() for n, row in zip(counts.flatten(), indices.flatten(0, 2), strict=True)
        ]
        assert all(row == sorted(set(row)) for row in listed)
        places = torch.arange(indices.shape[-1]) >= counts[..., None]
        assert not indices[places].any()
        rows[kind] = listed
    pad = (0, -geometry["kv_len"] % plan.block_k, 0, -geometry["q_len"] % plan.block_q)

    def per_block(pairs: torch.Tensor) -> torch.Tensor:  # [.., T_q, T_k, BQ, BK]
        pairs = F.pad(pairs, pad)
        return (
            pairs.unflatten(-1, (-1, plan.block_k)).unflatten(2, (-1, plan.block_q)).transpose(3, 4)
        )

    seen = per_block(visible_pairs(geometry))
    shown = (seen.any(-1).any(-1) & mask).flatten(0, 2)
    valid_q = per_block(torch.ones(1, 1, plan.q_len, plan.kv_len, dtype=torch.bool)).any(-1)
    if plan.q_block_sizes is not None:
        valid_q = valid_q & (torch.arange(plan.block_q) < plan.q_block_sizes[:, None])[:, None]
    whole = (seen.all(-1) | ~valid_q).all(-1).expand_as(mask & seen.any(-1).any(-1)).flatten(0, 2)
    for partial, full, visible, complete in zip(*rows.values(), shown, whole, strict=True):
        assert not set(partial) & set(full)
        assert sorted(partial + full) == visible.nonzero().flatten().tolist()
        assert all(complete[full])
        if (
            plan.window is None
        ):  # a block between sink and window may be whole without being listed so
            assert not any(complete[partial])


@settings(max_examples=60)
@given(masks(200))
def test_density_is_the_share_of_the_pairs_that_a_dense_call_computes(case):
    mask, geometry = case
    plan = SparsePlan.from_block_mask(mask, **geometry)
    attended = dense_mask(mask, geometry)  # a column inside a block that is read counts once
    dense = visible_pairs(geometry, windowed=False).expand_as(attended)
    assert plan.density() == pytest.approx(attended.sum().item() / max(dense.sum().item(), 1))
    assert plan.density_tensor().ndim == 0


@given(masks(100, heads=(1, 4), blocks=(16, 32)), seeds)
def test_recall_is_the_mean_softmax_mass_that_is_read(case, seed):
    mask, geometry = case
    batch = len(geometry.get("kv_lengths", [0, 0]))
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, geometry["q_len"], 16, generator=g, dtype=torch.float64)
    k = torch.randn(batch, 2, geometry["kv_len"], 16, generator=g, dtype=torch.float64)
    recall = SparsePlan.from_block_mask(mask, **geometry).recall(q, k)
    seen = visible_pairs(geometry)
    logits = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~seen, -torch.inf)
    mass = (logits.softmax(-1).nan_to_num() * dense_mask(mask, geometry)).sum(-1)
    expected = mass.sum(-1) / seen.any(-1).sum(-1).clamp(min=1)
    torch.testing.assert_close(recall, expected.expand(batch, 4))


@given(masks(200))
def test_skip_lists_hold_what_is_skipped_visible_and_not_read(case):
    mask, geometry = case
    geometry.setdefault("skip", torch.zeros_like(mask))
    plan = SparsePlan.from_block_mask(mask, **geometry)
    listed = block_mask(plan.skip_num_blocks, plan.skip_indices, plan.num_k_blocks)
    assert not (listed & (plan.to_block_mask() | ~geometry["skip"])).any()
    missing = geometry["skip"] & ~plan.to_block_mask() & ~listed
    # Only blocks without any visible pair may be left out, whoever reads them.
    assert not dense_mask(missing, {**geometry, "columns": None}).any()


def test_the_linear_scopes_part_the_blocks():
    skip = ~MASK & (torch.arange(4) > 1)
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    plan = SparsePlan.from_block_mask(mask, **SQUARE, skip=skip | (torch.arange(4) == 3))
    assert plan.linear_blocks("all").all()
    assert torch.equal(plan.linear_blocks("complement"), ~mask)
    assert torch.equal(plan.linear_blocks("marginal"), ~mask & (torch.arange(4) != 3))
    unskipped = SparsePlan.from_block_mask(mask, **SQUARE)
    assert torch.equal(unskipped.linear_blocks("marginal"), ~mask)


@given(masks(200))
def test_transpose_lists_the_rows_of_each_key_block(case):
    mask, geometry = case
    plan = SparsePlan.from_block_mask(mask, **geometry)
    lists = plan.transpose()
    for columns, counts, indices in (
        (lists.partial, plan.kv_num_blocks, plan.kv_indices),
        (lists.full, plan.full_kv_num_blocks, plan.full_kv_indices),
    ):
        rows = block_mask(counts, indices, plan.num_k_blocks)
        assert torch.equal(block_mask(*columns, plan.num_q_blocks), rows.mT)
        assert columns.counts.sum() == counts.sum()
        assert columns.indices.dtype == torch.int32


def test_rows_of_the_blocks_are_queries_in_q_order():
    order = torch.tensor([[3, 0, 2, 1]])
    mask = torch.eye(2, dtype=torch.bool)[None, None]
    plan = SparsePlan.from_block_mask(
        mask, block_q=2, block_k=2, q_len=4, kv_len=4, q_order=order, causal=True
    )
    rows = [row.nonzero().flatten().tolist() for row in plan.to_dense_mask()[0, 0]]
    assert rows == [[0], [], [2], [0, 1]]


def test_causal_is_aligned_to_the_bottom_right():
    for q_len, kv_len in ((3, 5), (5, 3), (4, 4)):
        plan = all_blocks(block_q=2, block_k=2, q_len=q_len, kv_len=kv_len, causal=True)
        seen = plan.to_dense_mask()[0, 0]
        assert torch.equal(seen, torch.ones(q_len, kv_len).tril(kv_len - q_len).bool())
        assert plan.density() == 1


def test_the_window_counts_back_from_the_query_and_never_hides_the_sink():
    plan = all_blocks(block_q=2, block_k=2, q_len=6, kv_len=6, causal=True, window=2, sink=1)
    rows = [row.nonzero().flatten().tolist() for row in plan.to_dense_mask()[0, 0]]
    assert rows == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]


def test_kv_lengths_cut_the_keys_of_each_batch_entry():
    plan = all_blocks(**SQUARE, kv_lengths=torch.tensor([64, 17, 0]))
    assert plan.k_sizes().tolist() == [[16] * 4, [16, 1, 0, 0], [0] * 4]
    assert plan.to_dense_mask().sum(-1)[:, 0, 0].tolist() == [64, 17, 0]
    assert plan.full_kv_num_blocks[:, 0, 0].tolist() == [4, 1, 0]
    assert plan.kv_num_blocks[:, 0, 0].tolist() == [0, 1, 0]


def test_ragged_tiles_hide_their_padding_on_both_sides():
    sizes = torch.tensor([16, 3, 0, 16])
    plan = all_blocks(**SQUARE, q_block_sizes=sizes, k_block_sizes=sizes)
    valid = torch.tensor([True] * 16 + [True] * 3 + [False] * 29 + [True] * 16)
    assert torch.equal(plan.to_dense_mask()[0, 0], valid[:, None] & valid)
    assert plan.density() == 1


def test_an_empty_mask_is_a_plan_that_reads_nothing():
    plan = SparsePlan.from_block_mask(torch.zeros(1, 2, 4, 4, dtype=torch.bool), **SQUARE)
    assert not plan.to_dense_mask().any()
    assert plan.density() == 0
    assert plan.recall(torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)).tolist() == [[0, 0]]


# -- choosing blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topk", "blocks", "expected"),
    [(1e-6, 10, 1), (0.1, 10, 1), (0.11, 10, 2), (0.25, 3, 1), (0.5, 5, 3), (1.0, 7, 7), (1, 7, 7)],
)
def test_topk_keeps_the_fraction_rounded_up_and_at_least_one(topk, blocks, expected, generator):
    scores = torch.randn(3, blocks, generator=generator)
    plan = plan_of(scores.tolist(), topk=float(topk))
    assert [len(row) for row in kept(plan)] == [expected] * 3
    assert kept(plan) == [
        sorted(row[:expected]) for row in scores.argsort(-1, descending=True).tolist()
    ]


@pytest.mark.parametrize(
    ("topk", "blocks", "expected"), [(0.07, 100, 7), (0.14, 50, 7), (0.55, 100, 55)]
)
def test_topk_is_not_rounded_up_for_a_binary_fraction(topk, blocks, expected):
    assert topk * blocks > expected  # such as 7.000000000000001
    assert len(kept(plan_of([[0.0] * blocks], topk=topk))[0]) == expected


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_count_is_the_fraction_that_stands_for_it(count, generator):
    scores = torch.randn(3, 5, generator=generator).tolist()
    assert kept(plan_of(scores, count=count)) == kept(plan_of(scores, topk=count / 5))
    both = kept(plan_of(scores, count=count, top_p=0.6))
    assert both == kept(plan_of(scores, topk=count / 5, top_p=0.6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0: .*4"),
        ({"count": 5}, "count=5: .*4"),
        ({"count": 2, "topk": 0.5}, "topk.*'topk', 'count'"),
        ({"count": 2, "limit": 0.5}, "limit=0.5: .*top_p"),
        ({"count": 3, "top_p": 0.5, "limit": 0.5}, "limit=0.5: .*count=3"),
    ],
)
def test_counts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_of([[0.0] * 4], **options)


def test_ties_go_to_the_lower_index():
    assert kept(plan_of([[1.0, 2, 2, 2, 0]], topk=0.4)) == [[1, 2]]
    assert kept(plan_of([[0.0] * 300], topk=0.1)) == [list(range(30))]
    assert kept(plan_of([[0.0] * 4], top_p=0.5)) == [[0, 1]]


def test_top_p_keeps_the_fewest_blocks_that_reach_the_mass():
    weights = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    scores = weights.log().tolist()
    expected = {
        0.01: [1],
        0.49: [1],
        0.51: [1, 3],
        0.74: [1, 3],
        0.76: [1, 2, 3],
        1.0: [0, 1, 2, 3],
    }
    for top_p, blocks in expected.items():
        assert kept(plan_of(scores, top_p=top_p)) == [blocks]


def test_topk_and_top_p_together_keep_the_union():
    scores = torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.3, 0.28, 0.22, 0.2]]).log().tolist()
    assert kept(plan_of(scores, topk=0.5)) == [[0, 1], [0, 1]]
    assert kept(plan_of(scores, top_p=0.7)) == [[0], [0, 1, 2]]
    assert kept(plan_of(scores, topk=0.5, top_p=0.7)) == [[0, 1], [0, 1, 2]]


def test_threshold_keeps_what_reaches_it_and_always_the_best():
    scores = [[0.0, 1, 2, 3], [-3.0, -1, -2, -4]]
    assert kept(plan_of(scores, threshold=2.0)) == [[2, 3], [1]]


def test_a_block_that_no_query_may_see_takes_no_place_among_the_best():
    scores = [[0.0, 1, 2, 3]] * 4
    assert kept(plan_of(scores, topk=0.5, causal=True)) == [[0], [0, 1], [1, 2], [2, 3]]
    two = torch.tensor(scores)[None, None]
    sizes = {"block_q": 1, "block_k": 1, "q_len": 4, "kv_len": 4}
    plan = SparsePlan.from_scores(two, topk=0.25, **sizes, kv_lengths=torch.tensor([4, 2, 0]))
    assert plan.to_block_mask()[:, 0, 0].int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0] * 4]


def test_forced_blocks_come_on_top_of_topk():
    scores = [[0.0, 1, 2, 3, 9, 5]] * 6
    assert kept(plan_of(scores, topk=0.1, sink_blocks=2)) == [[0, 1, 4]] * 6
    assert kept(plan_of(scores, topk=0.1, diagonal=0)) == [sorted({i, 4}) for i in range(6)]
    assert kept(plan_of(scores, topk=0.1, sink_blocks=1, diagonal=1))[3] == [0, 2, 3, 4]


def test_tail_blocks_have_no_score_and_are_read_by_every_row():
    scores = torch.arange(30.0).view(1, 1, 6, 5)
    sizes = {"block_q": 1, "block_k": 2, "q_len": 6}
    plan = SparsePlan.from_scores(scores, topk=0.4, skip=0.4, tail_blocks=2, kv_len=13, **sizes)
    assert kept(plan) == [[3, 4, 5, 6]] * 6
    assert skipped(plan) == [[0, 1]] * 6
    plan = SparsePlan.from_scores(
        scores, topk=0.1, tail_blocks=1, sink_blocks=1, kv_len=12, **sizes
    )
    assert kept(plan) == [[0, 4, 5]] * 6
    with pytest.raises(ValueError, match=r"scores: .*\(1, 1, 6, 5\).*6, 6\]"):
        SparsePlan.from_scores(scores, topk=0.4, tail_blocks=1, kv_len=14, **sizes)


def test_a_forced_block_that_no_query_may_see_is_not_read():
    scores = [[0.0] * 4] * 4
    assert kept(plan_of(scores, topk=0.1, sink_blocks=3, causal=True))[0] == [0]
    assert kept(plan_of(scores, topk=0.1, diagonal=1, causal=True)) == [
        [0], [0, 1], [0, 1, 2], [0, 2, 3]
    ]  # fmt: skip
    lengths = torch.tensor([2])
    assert kept(plan_of(scores, topk=0.1, diagonal=0, kv_lengths=lengths))[3] == [0]


@given(geometries(200, rules=("all", "causal", "shifted", "window")), st.integers(0, 3), seeds)
def test_the_diagonal_is_the_blocks_around_the_own_positions(geometry, reach, seed):
    scores = random_scores(geometry, seed)
    read = SparsePlan.from_scores(scores, topk=1e-9, diagonal=reach, **geometry).to_block_mask()
    best = SparsePlan.from_scores(scores, topk=1e-9, **geometry).to_block_mask()
    offset = geometry.get("q_offset", 0)
    if geometry.get("causal"):
        offset = geometry.get("q_offset", geometry["kv_len"] - geometry["q_len"])
    near = torch.zeros_like(read)
    for query in range(geometry["q_len"]):
        at = (query + offset) // geometry["block_k"]
        lowest, above = max(at - reach, 0), max(at + reach + 1, 0)
        near[0, 0, query // geometry["block_q"], lowest:above] = True
    every = SparsePlan.from_block_mask(torch.ones_like(read), **geometry).to_block_mask()
    assert torch.equal(read, best | (near & every))


def test_the_worst_blocks_are_skipped_but_never_those_that_are_kept():
    scores = [[0.0, 4, 1, 3, 2]]
    assert skipped(plan_of(scores, topk=0.2, skip=0.4)) == [[0, 2]]
    assert skipped(plan_of(scores, topk=0.2, skip=0.4, sink_blocks=1)) == [[2]]
    assert skipped(plan_of(scores, topk=0.8, skip=0.4)) == [[0]]
    assert skipped(plan_of(scores, topk=0.2, skip=0.39)) == [[0]]
    assert plan_of(scores, topk=0.2).skip_indices is None


def test_blocks_that_nobody_sees_are_not_among_the_worst():
    plan = plan_of([[0.0, 1, 2, 3]] * 4, topk=0.25, skip=0.25, causal=True)
    assert skipped(plan) == [[], [0], [0], [0]]


CRITERIA = {
    "topk": {"topk": 0.3},
    "top_p": {"top_p": 0.6},
    "both": {"topk": 0.1, "top_p": 0.5},
    "threshold": {"threshold": 0.5},
}


@pytest.mark.parametrize("criterion", CRITERIA)
@given(geometry=geometries(300, blocks=(16, 32)), skip=st.sampled_from([0.0, 0.2, 0.7]), seed=seeds)
def test_every_row_that_sees_a_key_reads_a_block(criterion, geometry, skip, seed):
    options = CRITERIA[criterion]
    scores = random_scores(geometry, seed)
    plan = SparsePlan.from_scores(scores, skip=skip, **options, **geometry)
    assert plan.equals(SparsePlan.from_scores(scores, skip=skip, **options, **geometry))
    read = plan.to_block_mask()
    everything = SparsePlan.from_block_mask(torch.ones_like(scores, dtype=torch.bool), **geometry)
    assert torch.equal(read.any(-1), everything.to_block_mask().any(-1).expand_as(read.any(-1)))
    if skip:
        lists = plan.skip_num_blocks, plan.skip_indices
        assert not (block_mask(*lists, plan.num_k_blocks) & read).any()
    for kind in ("kv", "full_kv"):  # on a CPU, lists are as wide as the longest row
        counts = getattr(plan, f"{kind}_num_blocks")
        assert getattr(plan, f"{kind}_indices").shape[-1] == max(int(counts.max()), 1)


@settings(max_examples=50)
@given(
    geometry=geometries(300, blocks=(16, 32)), topk=st.sampled_from([0.05, 0.3, 0.8]),
    diagonal=st.sampled_from([None, 0, 2]), sink_blocks=st.integers(0, 2), shuffled=st.booleans(),
    seed=seeds,
)  # fmt: skip
def test_lists_as_wide_as_promised_hold_every_block(
    geometry, topk, diagonal, sink_blocks, shuffled, seed
):
    """The width of the lists is an upper bound on a GPU, because counting would need a synchronisation."""
    if shuffled and "q_block_sizes" not in geometry:
        order = torch.randperm(geometry["q_len"], generator=torch.Generator().manual_seed(seed))
        geometry["q_order"] = order[None]
    options = {"topk": topk, "diagonal": diagonal, "sink_blocks": sink_blocks, **geometry}
    scores = random_scores(geometry, seed)
    counted = SparsePlan.from_scores(scores, **options)
    with mock.patch.object(lists, "reads_freely", return_value=False):
        bounded = SparsePlan.from_scores(scores, **options)
    assert torch.equal(bounded.to_block_mask(), counted.to_block_mask())


# -- what is known before the scores are read ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({"top_p": 1.0, "limit": 0.5}, 3),
        ({"top_p": 0.01, "limit": 0.5}, 1),
        ({"threshold": -9.0, "limit": 0.5}, 3),
        ({"topk": 0.2, "top_p": 1.0, "limit": 0.5}, 3),
        ({"topk": 0.4, "top_p": 1.0, "limit": 0.4}, 2),
        ({"top_p": 1.0, "limit": 1e-9}, 1),
    ],
)
def test_a_limit_keeps_the_best(options, keeps, generator):
    scores = torch.randn(3, 5, generator=generator)
    assert kept(plan_of(scores.tolist(), **options)) == [
        sorted(row[:keeps]) for row in scores.argsort(-1, descending=True).tolist()
    ]


@settings(max_examples=50)
@given(
    geometry=geometries(300, blocks=(16, 32)), options=st.sampled_from([
        {"topk": 0.1}, {"top_p": 0.9, "limit": 0.3}, {"threshold": 0.0, "limit": 0.2},
        {"topk": 0.1, "top_p": 0.9, "limit": 0.3}, {"topk": 0.9},
    ]),
    skip=st.sampled_from([0.0, 0.4]), diagonal=st.sampled_from([None, 1]), seed=seeds,
)  # fmt: skip
def test_the_row_bound_holds_and_is_the_same_on_every_device(
    geometry, options, skip, diagonal, seed
):
    options = {**options, **geometry, "skip": skip, "diagonal": diagonal, "sink_blocks": 1}
    scores = random_scores(geometry, seed)
    plan = SparsePlan.from_scores(scores, **options)
    counts = plan.kv_num_blocks + plan.full_kv_num_blocks
    if plan.skip_num_blocks is not None:
        counts = counts + plan.skip_num_blocks
    assert int(counts.max()) <= plan.row_bound <= plan.num_k_blocks * (1 + skip)
    options = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    elsewhere = SparsePlan.from_scores(scores.to("meta"), **options)
    assert elsewhere.row_bound == plan.row_bound
    assert elsewhere.full_kv_indices.shape[-1] <= plan.row_bound


def test_no_row_bound_without_a_limit():
    scores = torch.zeros(1, 1, 4, 4)
    for options in ({"top_p": 0.5}, {"threshold": 0.0}, {"topk": 0.1, "top_p": 0.5}):
        assert SparsePlan.from_scores(scores, **options, **SQUARE).row_bound is None
    assert SparsePlan.from_block_mask(MASK, **SQUARE).row_bound is None
    assert SparsePlan.from_block_mask(MASK, **SQUARE, most=4).row_bound == 4


def test_scores_of_minus_infinity_are_ranked_before_blocks_that_nobody_sees():
    scores = [[-torch.inf] * 4] * 4
    assert kept(plan_of(scores, topk=0.25, causal=True)) == [[0]] * 4
    order = torch.tensor([[3, 2, 1, 0]])
    plan = plan_of(scores, topk=0.25, causal=True, window=1, q_order=order)
    assert kept(plan) == [[3], [2], [1], [0]]


def test_scores_of_minus_infinity_add_nothing_to_top_p():
    scores = [[-torch.inf] * 4, [-torch.inf, -torch.inf, 3.0, -torch.inf]]
    assert kept(plan_of(scores, top_p=1.0)) == [[0], [2]]


@settings(max_examples=40)
@given(
    geometry=geometries(200, rules=("all", "kv_lengths", "ragged")), seed=seeds,
    dense_queries=st.integers(0, 3), options=st.sampled_from([{"topk": 0.3}, {"top_p": 0.6}]),
)  # fmt: skip
def test_a_tally_counts_plans_attended_pairs_and_all_pairs(geometry, seed, dense_queries, options):
    scores = random_scores(geometry, seed).expand(-1, 2, -1, -1)
    tally = torch.tensor([3, 100, 1000])
    plan = SparsePlan.from_scores(
        scores, tally=tally, dense_queries=dense_queries, **options, **geometry
    )
    read = plan.to_dense_mask()
    dense = visible_pairs(geometry).expand_as(read)
    extra = dense_queries * int(plan.k_sizes().sum()) * 2
    assert tally.tolist() == [
        4, 100 + int(read.sum()) + extra, 1000 + int(dense.sum()) + extra
    ]  # fmt: skip


# -- a plan is data --------------------------------------------------------------------------------


EXTRAS = {
    "skip": torch.arange(16).view(1, 1, 4, 4) % 3 == 0,
    "columns": torch.tensor([[[3, 20, 64], [0, 64, 64]]]),
    "q_order": torch.randperm(64, generator=torch.Generator().manual_seed(0))[None],
    "long_rows": torch.tensor([1, 3]),
}
OTHER_COLUMNS = torch.tensor([[[3, 21, 64], [0, 64, 64]]])


def sample_plan(**changes) -> SparsePlan:
    mask = random_block_mask(SQUARE, 0.5, (1, 2), 3)
    return SparsePlan.from_block_mask(mask, **SQUARE, **changes)


def test_equals_compares_tensors_and_numbers():
    plan = sample_plan()
    assert plan.equals(sample_plan())
    assert not plan.equals(sample_plan(causal=True))
    assert not plan.equals(sample_plan(kv_lengths=torch.tensor([64])))
    assert not sample_plan(kv_lengths=torch.tensor([64])).equals(plan)
    assert not plan.equals(dataclasses.replace(plan, sink=1))
    assert not plan.equals(dataclasses.replace(plan, full_kv_indices=plan.full_kv_indices + 1))
    assert sample_plan(**EXTRAS).equals(sample_plan(**EXTRAS))
    for name, x in EXTRAS.items():
        assert not plan.equals(sample_plan(**{name: x}))
        other = OTHER_COLUMNS if name == "columns" else x.flip(-1)
        assert not sample_plan(**EXTRAS).equals(sample_plan(**{**EXTRAS, name: other}))


def test_to_moves_every_tensor():
    plan = sample_plan(kv_lengths=torch.tensor([50]), **EXTRAS)
    assert plan.to("cpu").equals(plan)
    moved = plan.to("meta")
    assert moved.device.type == "meta"
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 10
    assert all(x.device.type == "meta" for x in tensors)


@pytest.mark.parametrize(
    "changes", [{}, {"kv_lengths": torch.tensor([50])}, {"causal": True}, EXTRAS], ids=", ".join
)
def test_a_plan_is_a_pytree_whose_leaves_rebuild_it(changes):
    plan = sample_plan(**changes)
    leaves, spec = _pytree.tree_flatten(plan)
    tensors = [x for x in vars(plan).values() if isinstance(x, torch.Tensor)]
    assert sum(isinstance(x, torch.Tensor) for x in leaves) == len(tensors)
    assert _pytree.tree_unflatten(leaves, spec).equals(plan)


def test_repr_tells_shape_rules_and_density():
    text = repr(sample_plan(causal=True))
    for part in ("[1, 2]", "4 rows x 4 blocks", "16/16 tokens", "64 queries, 64 keys", "causal"):
        assert part in text
    assert f"density {sample_plan(causal=True).density():.3f}" in text
    assert "not causal" in repr(sample_plan())


# -- bad input -------------------------------------------------------------------------------------

BAD_MASKS = {
    "mask has too few rows": ("mask", {"mask": MASK[:, :, :3]}),
    "mask has too many columns": ("mask", {"mask": MASK.expand(1, 1, 4, 4).repeat(1, 1, 1, 2)}),
    "mask without heads": ("mask", {"mask": MASK[0]}),
    "mask of integers": ("mask", {"mask": MASK.int()}),
    "block_q of zero": ("block_q", {"block_q": 0}),
    "block_k not whole": ("block_k", {"block_k": 16.0}),
    "no query": ("q_len", {"q_len": 0}),
    "negative keys": ("kv_len", {"kv_len": -64}),
    "window without causal": ("window", {"window": 4}),
    "empty window": ("window", {"window": 0, "causal": True}),
    "window not whole": ("window", {"window": 1.5, "causal": True}),
    "negative sink": ("sink", {"sink": -1}),
    "causal ragged queries": ("causal", {"causal": True, "q_block_sizes": torch.full((4,), 16)}),
    "causal ragged keys": ("causal", {"causal": True, "k_block_sizes": torch.full((4,), 16)}),
    "too few sizes": ("q_block_sizes", {"q_block_sizes": torch.full((3,), 16)}),
    "size above the block": ("k_block_sizes", {"k_block_sizes": torch.tensor([16, 16, 17, 16])}),
    "negative size": ("k_block_sizes", {"k_block_sizes": torch.tensor([16, 16, -1, 16])}),
    "negative length": ("kv_lengths", {"kv_lengths": torch.tensor([-1])}),
    "length above kv_len": ("kv_lengths", {"kv_lengths": torch.tensor([65])}),
    "lengths of another batch": (
        "kv_lengths",
        {"mask": MASK.repeat(3, 1, 1, 1), "kv_lengths": torch.tensor([1, 2])},
    ),
    "skip of another shape": ("skip", {"skip": MASK[..., :3]}),
    "skip of integers": ("skip", {"skip": MASK.int()}),
    "columns without heads": ("columns", {"columns": torch.tensor([[1, 2]])}),
    "column above kv_len": ("columns", {"columns": torch.tensor([[[1, 65]]])}),
    "negative column": ("columns", {"columns": torch.tensor([[[-1, 2]]])}),
    "columns out of order": ("columns", {"columns": torch.tensor([[[2, 1]]])}),
    "column twice": ("columns", {"columns": torch.tensor([[[2, 2]]])}),
    "column after the unused": ("columns", {"columns": torch.tensor([[[64, 2]]])}),
    "order of too few queries": ("q_order", {"q_order": torch.arange(63)[None]}),
    "order without heads": ("q_order", {"q_order": torch.arange(64)}),
    "order with a query twice": ("q_order", {"q_order": torch.zeros(1, 64, dtype=torch.int)}),
    "order and ragged queries": (
        "q_order",
        {"q_order": torch.arange(64)[None], "q_block_sizes": torch.full((4,), 16)},
    ),
    "long row that is none": ("long_rows", {"long_rows": torch.tensor([4])}),
    "column that is no integer": ("columns", {"columns": torch.tensor([[[3.7]]])}),
    "lengths as a list": ("kv_lengths", {"kv_lengths": [64]}),
    "order of other heads": (
        "q_order",
        {"mask": MASK.expand(1, 2, 4, 4), "q_order": torch.arange(64).expand(3, 64)},
    ),
    "columns of other heads": (
        "columns",
        {"mask": MASK.expand(1, 2, 4, 4), "columns": torch.tensor([[[1], [2], [3]]])},
    ),
    "skip of another batch": (
        "skip",
        {"mask": MASK.expand(2, 1, 4, 4), "skip": ~MASK.expand(3, 1, 4, 4)},
    ),
    "sink without a window": ("sink", {"sink": 5}),
    "half a key of the sink": ("sink", {"sink": 1.5, "window": 3, "causal": True}),
    "q_offset of a half": ("q_offset", {"q_offset": 0.5, "causal": True}),
    "lists of no width": ("most", {"most": 0}),
    "lengths in a column": ("kv_lengths", {"kv_lengths": torch.tensor([[1], [2]])}),
}
BAD_SCORES = {
    "nothing to choose by": ("topk, top_p, threshold", {}),
    "threshold and topk": ("topk, top_p, threshold", {"threshold": 0.0, "topk": 0.5}),
    "threshold and top_p": ("topk, top_p, threshold", {"threshold": 0.0, "top_p": 0.5}),
    "topk of zero": ("topk", {"topk": 0.0}),
    "topk above one": ("topk", {"topk": 1.5}),
    "topk of nan": ("topk", {"topk": float("nan")}),
    "negative top_p": ("top_p", {"top_p": -0.5}),
    "top_p above one": ("top_p", {"top_p": 1.01}),
    "skip of everything": ("skip", {"skip": 1.0, "topk": 0.5}),
    "negative skip": ("skip", {"skip": -0.1, "topk": 0.5}),
    "negative sink_blocks": ("sink_blocks", {"sink_blocks": -1, "topk": 0.5}),
    "negative tail_blocks": ("tail_blocks", {"tail_blocks": -1, "topk": 0.5}),
    "negative diagonal": ("diagonal", {"diagonal": -1, "topk": 0.5}),
    "scores of other lengths": ("scores", {"scores": torch.zeros(1, 1, 3, 4), "topk": 0.5}),
    "limit of zero": ("limit", {"top_p": 0.5, "limit": 0.0}),
    "limit above one": ("limit", {"top_p": 0.5, "limit": 1.5}),
    "limit of topk alone": ("limit", {"topk": 0.5, "limit": 0.7}),
    "limit below topk": ("limit", {"topk": 0.5, "top_p": 0.5, "limit": 0.3}),
    "tally of floats": ("tally", {"topk": 0.5, "tally": torch.zeros(3)}),
    "short tally": ("tally", {"topk": 0.5, "tally": torch.zeros(2, dtype=torch.int64)}),
    "tally of a causal plan": (
        "tally",
        {"topk": 0.5, "tally": torch.zeros(3, dtype=torch.int64), "causal": True},
    ),
    "tally with gaps": ("tally", {"topk": 0.5, "tally": torch.zeros(6, dtype=torch.int64)[::2]}),
    "no block with a score": (
        "tail_blocks",
        {"topk": 0.5, "tail_blocks": 4, "scores": torch.zeros(1, 1, 4, 0)},
    ),
    "half a sink block": ("sink_blocks", {"sink_blocks": 1.5, "topk": 0.5}),
    "half a tail block": ("tail_blocks", {"tail_blocks": 0.5, "topk": 0.5}),
    "half a diagonal": ("diagonal", {"diagonal": 0.5, "topk": 0.5}),
    "threshold of nan": ("threshold", {"threshold": float("nan")}),
    "negative dense_queries": ("dense_queries", {"topk": 0.5, "dense_queries": -1}),
    "scores without heads": ("scores", {"scores": torch.zeros(1, 4, 4), "topk": 0.5}),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_bad_argument_of_from_block_mask_is_named(case, unchecked):
    name, changes = BAD_MASKS[case]
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        SparsePlan.from_block_mask(**{"mask": MASK, **SQUARE, **changes})


@pytest.mark.parametrize("case", BAD_SCORES)
def test_a_bad_argument_of_from_scores_is_named(case, unchecked):
    name, changes = BAD_SCORES[case]
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        SparsePlan.from_scores(**{"scores": torch.zeros(1, 1, 4, 4), **SQUARE, **changes})


def changed(x: torch.Tensor, value: int) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[0] = value
    return x


@pytest.mark.parametrize("value", [-1, 100])
@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}_{what}" for kind in ("kv", "full_kv", "skip") for what in ("num_blocks", "indices")),
        *("q_block_sizes", "k_block_sizes", "kv_lengths", "columns", "long_rows", "q_order"),
    ],
)  # fmt: skip
def test_check_numbers_names_the_field_that_is_out_of_range(name, value):
    extras = {**EXTRAS, "kv_lengths": torch.tensor([50])}
    if name == "q_block_sizes":
        del extras["q_order"]
    sizes = torch.full((4,), 16)
    if name != "q_order":
        extras |= {"k_block_sizes": sizes}
    if "q_order" not in extras:
        extras["q_block_sizes"] = sizes
    plan = sample_plan(**extras)
    plan.check_numbers()
    bad = dataclasses.replace(plan, **{name: changed(getattr(plan, name), value)})
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        bad.check_numbers()


def test_check_numbers_wants_counts_and_indices_that_fit(unchecked):
    plan = sample_plan()
    bad = dataclasses.replace(plan, kv_indices=plan.kv_indices[:, :1])
    with pytest.raises(ValueError, match=r"^kv_indices: .*\(1, 1, 4, "):
        bad.check_numbers()


@pytest.mark.parametrize("rule", ["kv_lengths", "k_block_sizes"])
@pytest.mark.parametrize("name", ["kv_indices", "full_kv_indices", "skip_indices"])
def test_lists_that_name_blocks_without_keys_are_refused(name, rule):
    """Constructors never make such lists, but a rule that is added later may."""
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    skip = None
    if name == "skip_indices":
        mask[..., 2:] = False
        skip = ~mask
    plan = SparsePlan.from_block_mask(mask, block_q=8, block_k=8, q_len=16, kv_len=30, skip=skip)
    plan.check_numbers()
    rules = {"kv_lengths": torch.tensor([24, 17]), "k_block_sizes": torch.tensor([8, 8, 8, 0])}
    if name == "full_kv_indices":  # a block with keys, but not all of them
        rules = {"kv_lengths": torch.tensor([30, 20]), "k_block_sizes": torch.tensor([8, 8, 7, 6])}
    elif name == "skip_indices":
        rules["k_block_sizes"] = torch.tensor([8, 8, 0, 6])
    changed = dataclasses.replace(plan, **{rule: rules[rule].int()})
    with pytest.raises(ValueError, match=r"^\w+_indices: .*valid keys"):
        changed.check_numbers()
