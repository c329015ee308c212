import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

from dit_accel.kernels import SparsePlan

from .plan_cases import DENSITIES, dense_mask, geometries, random_block_mask, visible_pairs

SQUARE = {"block_q": 16, "block_k": 16, "q_len": 64, "kv_len": 64}
seeds = st.integers(0, 2**16)
heads = st.sampled_from([1, 3])


def all_blocks(**geometry) -> SparsePlan:
    n_q, n_k = (
        -(-geometry[n] // geometry[b]) for n, b in (("q_len", "block_q"), ("kv_len", "block_k"))
    )
    return SparsePlan.from_block_mask(torch.ones(1, 1, n_q, n_k, dtype=torch.bool), **geometry)


def plan_of(scores: list[list[float]], **options) -> SparsePlan:
    """A plan over one-token blocks, so that blocks and tokens are the same thing."""
    x = torch.tensor(scores)[None, None]
    sizes = {"block_q": 1, "block_k": 1, "q_len": x.shape[2], "kv_len": x.shape[3]}
    return SparsePlan.from_scores(x, **sizes, **options)


def kept(plan: SparsePlan) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in plan.to_block_mask()[0, 0]]


# -- what a plan means -----------------------------------------------------------------------------


@given(geometries(200), st.sampled_from(DENSITIES), heads, seeds)
def test_dense_mask_is_the_block_mask_under_the_visibility_rules(geometry, density, n_heads, seed):
    mask = random_block_mask(geometry, density, (1, n_heads), seed)
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


@given(geometries(200), st.sampled_from(DENSITIES), heads, seeds)
def test_density_is_the_share_of_the_pairs_that_a_dense_call_computes(
    geometry, density, n_heads, seed
):
    mask = random_block_mask(geometry, density, (1, n_heads), seed)
    plan = SparsePlan.from_block_mask(mask, **geometry)
    attended = dense_mask(mask, geometry)
    dense = visible_pairs(geometry, windowed=False).expand_as(attended)
    assert plan.density() == pytest.approx(attended.sum().item() / max(dense.sum().item(), 1))
    assert plan.density_tensor().ndim == 0


@given(geometries(100, blocks=(16, 32)), st.sampled_from(DENSITIES), seeds)
def test_recall_is_the_mean_softmax_mass_of_the_blocks_read(geometry, density, seed):
    batch = len(geometry.get("kv_lengths", [0, 0]))
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, geometry["q_len"], 16, generator=g, dtype=torch.float64)
    k = torch.randn(batch, 2, geometry["kv_len"], 16, generator=g, dtype=torch.float64)
    mask = random_block_mask(geometry, density, (1, 4), seed)
    recall = SparsePlan.from_block_mask(mask, **geometry).recall(q, k)
    seen = visible_pairs(geometry)
    logits = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~seen, -torch.inf)
    mass = (logits.softmax(-1).nan_to_num() * dense_mask(mask, geometry)).sum(-1)
    expected = mass.sum(-1) / seen.any(-1).sum(-1).clamp(min=1)
    torch.testing.assert_close(recall, expected.expand(batch, 4))


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


# -- a plan is data --------------------------------------------------------------------------------


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


def test_to_moves_every_tensor():
    plan = sample_plan(kv_lengths=torch.tensor([50]))
    assert plan.to("cpu").equals(plan)
    moved = plan.to("meta")
    assert moved.device.type == "meta"
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 5
    assert all(x.device.type == "meta" for x in tensors)


@pytest.mark.parametrize(
    "changes", [{}, {"kv_lengths": torch.tensor([50])}, {"causal": True}], ids=str
)
def test_a_plan_is_a_pytree_whose_leaves_rebuild_it(changes):
    plan = sample_plan(**changes)
    leaves, spec = _pytree.tree_flatten(plan)
    assert sum(isinstance(x, torch.Tensor) for x in leaves) == 4 + ("kv_lengths" in changes)
    assert _pytree.tree_unflatten(leaves, spec).equals(plan)


def test_repr_tells_shape_rules_and_density():
    text = repr(sample_plan(causal=True))
    for part in ("[1, 2]", "4 rows x 4 blocks", "16/16 tokens", "64 queries, 64 keys", "causal"):
        assert part in text
    assert f"density {sample_plan(causal=True).density():.3f}" in text
    assert "not causal" in repr(sample_plan())


# -- bad input -------------------------------------------------------------------------------------

MASK = torch.ones(1, 1, 4, 4, dtype=torch.bool)
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
    "scores of other lengths": ("scores", {"scores": torch.zeros(1, 1, 3, 4), "topk": 0.5}),
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
