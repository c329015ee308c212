"""Patterns: their plans are causal, keep what is always read, and equal their definitions spelled out slowly."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.llm.prefill import Prompt, pattern_names, pattern_of
from dit_accel.llm.prefill import xattention as xattention_module
from dit_accel.llm.prefill.vertical_slash import slash_blocks
from dit_accel.llm.prefill.xattention import antidiagonal_mass

from .prompts import always, attention, causal, check_plan, prompts, read_blocks

SPANS = [(10, 60, "image"), (70, 75, "audio"), [90, 170, "image"]]
PATTERNS = {
    "boundary": [
        {"share": 0.5},
        {"spans": SPANS, "share": 0.7, "shares": {"image": {"text": 0.2}, "audio": 1}},
    ],
    "flex_prefill": [
        {"gamma": 0.5, "min_budget": 0},
        {"gamma": 0.7, "min_budget": 40, "tau": 0.4},
        {"gamma": 0.6, "min_budget": 40, "tau": 2.0},
    ],
    "grid": [
        {"sink": 5, "window": 20},
        {"sink": 0, "window": 1, "min_gain": 0},
        {"stride": 9, "phase": 4, "window": 20},
        {"stride": 7, "phase": 6, "window": 20, "rows": True},
    ],
    "hybrid": [
        {"top_p": 0.5, "columns": 7},
        {"top_p": 0.7, "columns": 5, "scores": "spread", "queries": "last"},
        {"top_p": 0.4, "columns": 9, "per_group": True},
        {"top_p": 0.4, "scores": "spread", "per_group": True, "columns": 0},
    ],
    "a_shape": [{"sink": 16, "window": 33}],
    "blocks": [{"top_p": 0.6}, {"top_p": None, "topk": 0.3, "spread": False}],
    "triangle": [{"sink": 20, "window": 33}],
    "vertical_slash": [
        {"columns": 0.1, "slashes": 0.2, "min_columns": 0},
        {"columns": 0.01, "slashes": 0.01, "min_columns": 5, "min_slashes": 3, "last": 7},
    ],
    "xattention": [{"top_p": 0.5}, {"top_p": 0.8, "stride": 16}],
}
CASES = [
    # A-shape has a mask of its own, without blocks that are always read.
    (name, options)
    for name, several in PATTERNS.items()
    for options in several
    if name != "a_shape"
]
few = settings(max_examples=10)
"""Number of examples in tests with many cases. The definition of each pattern is checked with more examples below."""


@pytest.mark.parametrize(("name", "options"), CASES)
@few
@given(prompt=prompts())
def test_every_plan(name, options, prompt):
    check_plan(pattern_of(name, options), prompt)


def test_every_pattern_is_tested():
    assert set(PATTERNS) == set(pattern_names())


FULL = [
    ("boundary", {"share": 1}),
    ("boundary", {"spans": SPANS, "share": 0, "shares": {"image": 1, "text": 1.0, "audio": 1}}),
    ("flex_prefill", {"gamma": 1}),
    ("flex_prefill", {"gamma": 1, "tau": 2.0}),
    ("flex_prefill", {"gamma": 0.1, "min_budget": 10**6}),
    ("grid", {"window": 200}),
    ("grid", {"window": 1, "sink": 200, "stride": 50, "rows": True}),
    ("hybrid", {"top_p": 1.0}),
    ("hybrid", {"top_p": 1, "scores": "spread", "per_group": True}),
    ("vertical_slash", {"slashes": 1}),
    ("vertical_slash", {"columns": 1.0}),
    ("xattention", {"top_p": 1}),
]


@pytest.mark.parametrize(("name", "options"), FULL)
@few
@given(prompt=prompts())
def test_a_full_budget_reads_everything(name, options, prompt):
    plan, mask = check_plan(pattern_of(name, options), prompt)
    assert (mask == causal(prompt)).all()
    assert plan.density() == 1


GROWING = [
    ("boundary", "share", {"spans": SPANS, "shares": {"audio": 1}}),
    ("flex_prefill", "gamma", {"min_budget": 0, "tau": 0}),
    ("flex_prefill", "gamma", {"min_budget": 16, "tau": 2.0}),
    ("hybrid", "top_p", {"columns": 0}),
    ("hybrid", "top_p", {"columns": 0, "scores": "spread"}),
    ("hybrid", "top_p", {"columns": 0, "per_group": True}),
    ("vertical_slash", "columns", {"slashes": 0.01, "min_columns": 0}),
    ("vertical_slash", "slashes", {"columns": 0.01, "min_columns": 0}),
    ("xattention", "top_p", {}),
]


@pytest.mark.parametrize(("name", "option", "others"), GROWING)
@few
@given(prompt=prompts())
def test_recall_and_density_grow_with_the_budget(name, option, others, prompt):
    before = torch.zeros(prompt.q.shape[:2], dtype=torch.float64), 0.0
    for budget in (0.05, 0.3, 0.6, 0.9, 1.0):
        plan = pattern_of(name, {option: budget, **others}).plan(prompt)
        plan = plan.for_heads(prompt.q.shape[1])
        now = plan.recall(prompt.q, prompt.k, scale=prompt.scale), plan.density()
        assert (now[0] >= before[0] - 1e-9).all()
        assert now[1] >= before[1]
        before = now
    torch.testing.assert_close(before[0], torch.ones_like(before[0]))


@few
@given(prompt=prompts(), per_group=st.booleans())
def test_recall_grows_with_the_columns_of_hybrid(prompt, per_group):
    before = torch.zeros(prompt.q.shape[:2], dtype=torch.float64)
    for count in (0, 1, 5, 20, 200):
        options = {"top_p": 0.2, "columns": count, "per_group": per_group}
        plan = pattern_of("hybrid", options).plan(prompt).for_heads(prompt.q.shape[1])
        now = plan.recall(prompt.q, prompt.k, scale=prompt.scale)
        assert (now >= before - 1e-9).all()
        before = now
    # A last block without a spread query may still miss keys: up to 3 of more than 64 queries.
    assert (before > 0.95).all()


@pytest.mark.parametrize(("name", "option", "others"), GROWING)
def test_a_small_budget_is_sparse(name, option, others):
    plan = pattern_of(name, {option: 0.3, **others}).plan(long_prompt())
    assert 0.05 < plan.density() < 0.6


def long_prompt(length: int = 1024) -> Prompt:
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, h, length, 16, generator=g) for h in (4, 2))
    return Prompt(2 * q, k, scale=0.25, block=16, tail=16)


@pytest.mark.parametrize("offset", [0, 1, 15, 16, 17, 37])
@pytest.mark.parametrize("q_len", [1, 16, 40, 48, 50])
@pytest.mark.parametrize("tail", [0, 1, 2, 16, 18, 100])
def test_blocks_that_are_always_read_are_these_and_no_others(offset, q_len, tail):
    q = torch.zeros(1, 1, q_len, 4)
    prompt = Prompt(q, q.new_zeros(1, 1, q_len + offset, 4), scale=1.0, block=16, tail=tail)
    visible = prompt.block_distance() >= 0
    near, last = prompt.near(), prompt.last_rows()
    for i in range(prompt.num_q_blocks):
        rows = range(16 * i, min(16 * i + 16, q_len))
        assert last[i] == any(r >= q_len - tail for r in rows)
        for j in range(prompt.num_k_blocks):
            first = 16 * j
            assert visible[i, j] == (first <= rows[-1] + offset)
            wanted = any(
                first <= r + offset and (r + offset) // 16 - j <= 1 for r in rows
            )  # the key block of a query, or the one before
            if visible[i, j] and offset % 16 == 0:
                assert near[i, j] == (wanted or j == 0)
            elif visible[i, j]:  # up to three blocks
                assert near[i, j] >= (wanted or j == 0)
                assert near[i, j] <= (j == 0 or (rows[-1] + offset) // 16 - j <= 2)


# -- vertical-slash ----------------------------------------------------------------------------------


@given(prompt=prompts(), data=st.data())
def test_vertical_slash_is_its_definition(prompt, data):
    """Bands of distances and single keys, ranked by the attention of the last queries, pair by pair."""
    options = {
        "columns": data.draw(st.sampled_from([0.02, 0.1, 0.5])),
        "slashes": data.draw(st.sampled_from([0.05, 0.3])),
        "min_columns": data.draw(st.sampled_from([0, 9])),
        "min_slashes": data.draw(st.sampled_from([0, 2])),
        "last": data.draw(st.integers(1, 40)),
    }
    _, mask = check_plan(pattern_of("vertical_slash", options), prompt)
    block, n_k = prompt.block, prompt.num_k_blocks
    n_bands = max(options["min_slashes"], math.ceil(options["slashes"] * n_k))
    n_columns = max(options["min_columns"], math.ceil(options["columns"] * prompt.kv_len))
    weights = attention(prompt)[:, :, -options["last"] :]
    at = torch.arange(prompt.kv_len)[-weights.shape[2] :, None]
    key = torch.arange(prompt.kv_len)
    distance = torch.arange(prompt.q_len)[:, None] + prompt.offset - key
    for b, h in ((b, h) for b in range(len(mask)) for h in range(mask.shape[1])):
        bands = [(weights[b, h] * ((at - key) // block == m)).sum() for m in range(n_k)]
        best = sorted(range(n_k), key=lambda m: (-bands[m], m))[:n_bands]
        on_slash = sum(distance // block == m for m in best).bool() & causal(prompt)
        assert mask[b, h][on_slash].all()
        worth = weights[b, h].sum(0) * (key >= block) * (key // block < n_k - 2)
        columns = [j for j in worth.argsort(descending=True).tolist()[:n_columns] if worth[j] > 0]
        on_column = torch.isin(key, torch.tensor(columns)) & causal(prompt)
        assert mask[b, h][on_column].all()
        # Blocks with a pair on a slash are read whole, and nothing else is.
        touched = torch.nn.functional.pad(
            on_slash, (0, -prompt.kv_len % block, 0, -prompt.q_len % block)
        )
        touched = touched.unflatten(1, (-1, block)).any(2).unflatten(0, (-1, block)).any(1)
        near = prompt.near() & (prompt.block_distance() >= 0)
        rows = prompt.last_rows()[:, None] | near
        assert torch.equal(mask[b, h], read_blocks(prompt, touched | rows) | on_column)


@pytest.mark.parametrize("offset", range(17))
def test_blocks_of_a_band_hold_all_of_its_pairs_and_no_others(offset):
    q = torch.zeros(1, 1, 70, 4)
    prompt = Prompt(q, q.new_zeros(1, 1, 70 + offset, 4), scale=1.0, block=16)
    distance = torch.arange(70)[:, None] + offset - torch.arange(70 + offset)
    for band in range(prompt.num_k_blocks):
        bands = torch.arange(prompt.num_k_blocks) == band
        found = slash_blocks(prompt, bands[None, None])[0, 0]
        for i in range(prompt.num_q_blocks):
            for j in range(prompt.num_k_blocks):
                pairs = distance[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] // 16 == band
                assert found[i, j] == pairs.any()


def test_vertical_slash_finds_planted_keys_and_distances():
    length, columns, slash = 512, [70, 200, 333], 150
    g = torch.Generator().manual_seed(0)
    code = torch.nn.functional.normalize(torch.randn(length, 64, generator=g), dim=-1)
    key, query = code.clone(), torch.zeros(length, 64)
    query[slash:] += 12 * code[: length - slash]
    query += 12 * code[columns].sum(0)
    prompt = Prompt(query[None, None], key[None, None], scale=1.0, block=16, tail=16)
    plan = pattern_of("vertical_slash", {"columns": 0.01, "slashes": 0.03, "min_columns": 0}).plan(
        prompt
    )
    assert set(columns) <= set(plan.columns.flatten().tolist())
    mask = plan.to_dense_mask()[0, 0]
    assert mask.diagonal(-slash).all()
    assert plan.density() < 0.35
    assert plan.recall(prompt.q, prompt.k, scale=1.0) > 0.95


# -- xattention --------------------------------------------------------------------------------------


@given(prompt=prompts(100), stride=st.sampled_from([8, 16]), most=st.sampled_from([1, 3000, 2**22]))
def test_antidiagonal_mass_equals_a_loop(prompt, stride, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xattention_module, "CHUNK_SCORES", most)
        found = antidiagonal_mass(
            prompt.q, prompt.k, block=prompt.block, stride=stride, scale=prompt.scale
        )
    expected = torch.zeros_like(found)
    group = prompt.q.shape[1] // prompt.k.shape[1]
    starts = range(0, prompt.q_len, stride)
    for b, h in ((b, h) for b in range(found.shape[0]) for h in range(found.shape[1])):
        q, k = prompt.q[b, h], prompt.k[b, h // group]
        for a in starts:
            keys = [c for c in range(0, prompt.kv_len, stride) if c <= a + prompt.offset]
            logits = torch.zeros(len(keys), dtype=q.dtype)
            for n, c in enumerate(keys):
                for s in range(stride):
                    i, j = a + stride - 1 - s, c + s
                    if i < prompt.q_len and j < prompt.kv_len:
                        logits[n] += q[i] @ k[j] * prompt.scale / stride
            i = a // prompt.block
            rows = sum(x // prompt.block == i for x in starts)
            for n, weight in enumerate(logits.softmax(0)):
                expected[b, h, i, keys[n] // prompt.block] += weight / rows
    torch.testing.assert_close(found, expected)


@given(prompt=prompts(), top_p=st.sampled_from([0.3, 0.6, 0.9]))
def test_xattention_keeps_the_fewest_blocks_that_reach_top_p(prompt, top_p):
    _, mask = check_plan(pattern_of("xattention", {"top_p": top_p}), prompt)
    mass = antidiagonal_mass(prompt.q, prompt.k, block=prompt.block, stride=8, scale=prompt.scale)
    kept = torch.zeros_like(mass, dtype=torch.bool)
    for row, into in zip(mass.flatten(0, 2), kept.flatten(0, 2), strict=True):
        total = 0.0
        for j in row.argsort(descending=True).tolist():
            if total < top_p - 1e-6:
                into[j] = True
                total += row[j]
    expected = read_blocks(prompt, kept | prompt.always())
    assert torch.equal(mask, expected)
    assert (expected | ~always(prompt)).all()


# -- hybrid ------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    prompt=prompts(),
    count=st.integers(1, 20),
    queries=st.sampled_from(["spread", "last"]),
    per_group=st.booleans(),
)
def test_columns_of_hybrid_hold_most_of_what_its_blocks_leave_out(
    prompt, count, queries, per_group
):
    options = {"top_p": 0.4, "queries": queries, "per_group": per_group}
    pattern = pattern_of("hybrid", {"columns": count, **options})
    plan, mask = check_plan(pattern, prompt)
    own = prompt.k.shape[1] if per_group else prompt.q.shape[1]
    assert plan.columns.shape[:2] == (len(prompt.q), own)
    # Blocks alone, and without the last rows, which hide what the last queries would miss.
    alone = pattern_of("hybrid", {"columns": 0, **options})
    without_tail = dataclasses.replace(prompt, tail=0)
    blocks = alone.plan(without_tail).for_heads(prompt.q.shape[1]).to_dense_mask()
    left = attention(prompt) * ~blocks
    n = prompt.q_len
    if queries == "last":
        left = left[:, :, -64:]
    else:
        others = max(0, n - prompt.tail)
        step = max(1, math.ceil(others / 64))
        left = left[:, :, min(step // 2, max(0, others - 1)) : others : step]
    worth = left.sum(2) / max(1, left.shape[2])
    worth = worth.unflatten(1, (own, -1)).mean(2)
    for b, h in ((b, h) for b in range(len(worth)) for h in range(own)):
        best = [j for j in worth[b, h].argsort(descending=True).tolist()[:count] if worth[b, h, j]]
        found = plan.columns[b, h]
        assert found[found < prompt.kv_len].tolist() == sorted(best)
    assert (mask | ~blocks).all()


def test_columns_of_hybrid_find_scattered_keys():
    g = torch.Generator().manual_seed(0)
    scattered = torch.randperm(600, generator=g)[:12] + 100
    q, k = (torch.randn(1, 1, 1024, 16, generator=g) for _ in range(2))
    k[:, :, scattered, 0] += 8
    q[..., 0] = 3
    prompt = Prompt(q, k, scale=0.25, block=16, tail=16)
    blocks, both = (
        pattern_of("hybrid", {"top_p": 0.3, "columns": n, "scores": "spread"}).plan(prompt)
        for n in (0, 24)
    )
    found = [x.to_dense_mask()[0, 0, 700:, scattered].double().mean() for x in (blocks, both)]
    assert found[0] < 0.8
    assert found[1] == 1
    before, after = (x.recall(q, k, scale=0.25) for x in (blocks, both))
    assert after > before + 0.1
    assert both.density() < blocks.density() + 0.05


def test_heads_of_a_group_share_what_they_read():
    prompt = long_prompt()
    plan = pattern_of("hybrid", {"top_p": 0.5, "per_group": True}).plan(prompt)
    assert plan.heads == 2
    assert pattern_of("hybrid", {"top_p": 0.5}).plan(prompt).heads == 4


# -- flexprefill -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(prompt=prompts(), gamma=st.sampled_from([0.3, 0.7, 0.9]), least=st.sampled_from([0, 40]))
def test_flex_prefill_is_its_definition(prompt, gamma, least):
    """The choice of each head, and the blocks of either branch, one head and one block at a time."""
    tau = 0.35
    options = {"gamma": gamma, "min_budget": least, "tau": tau}
    _, mask = check_plan(pattern_of("flex_prefill", options), prompt)
    block, n_q, n_k = prompt.block, prompt.num_q_blocks, prompt.num_k_blocks
    fewest, group = math.ceil(least / block), prompt.q.shape[1] // prompt.k.shape[1]
    weights = attention(prompt)[:, :, (n_q - 1) * block :].mean(2)
    rows = attention(prompt)[:, :, (n_q - 1) * block :]
    for b, h in ((b, h) for b in range(len(mask)) for h in range(mask.shape[1])):
        q_mean = torch.stack([x.mean(0) for x in prompt.q[b, h].split(block)])
        k_mean = torch.stack([x.mean(0) for x in prompt.k[b, h // group].split(block)])
        logits = q_mean @ k_mean.T * prompt.scale
        means = logits.masked_fill(prompt.block_distance() < 0, -math.inf).softmax(-1)
        exact = torch.stack([x.sum() for x in weights[b, h].split(block)])
        middle = (means[-1] + exact) / 2
        divergence = sum(
            float(x[c] * (x[c] / middle[c]).log()) / 2
            for x in (means[-1], exact)
            for c in range(n_k)
            if x[c] > 0
        )
        chosen = torch.zeros(n_q, n_k, dtype=torch.bool)
        if max(0, divergence) ** 0.5 < tau:
            total = 0.0
            for flat in means.flatten().argsort(descending=True).tolist():
                if total < gamma - 1e-9:
                    chosen.view(-1)[flat] = True
                    total += float(means.view(-1)[flat]) / n_q
            for i in range(n_q):
                chosen[i, means[i].argsort(descending=True)[:fewest]] = True
        else:
            far = torch.zeros(prompt.kv_len, dtype=weights.dtype)
            for r in range(rows.shape[2]):
                at = prompt.kv_len - rows.shape[2] + r
                for j in range(at + 1):
                    far[at - j] += rows[b, h, r, j] / rows.shape[2]
            best = []
            for sums in (weights[b, h], far):
                tokens = int((sums.sort(descending=True).values.cumsum(0) < gamma).sum()) + 1
                count = math.ceil(max(tokens, least) / block)
                blocks = torch.stack([x.sum() for x in sums.split(block)])
                best.append(blocks.argsort(descending=True)[:count].tolist())
            chosen[:, best[0]] = True
            for i in range(prompt.q_len):
                for j in range(i + prompt.offset + 1):
                    if (i + prompt.offset - j) // block in best[1]:
                        chosen[i // block, j // block] = True
        assert torch.equal(mask[b, h], read_blocks(prompt, chosen | prompt.always()))


def test_flex_prefill_asks_the_queries_of_the_last_block_only():
    """Here it holds one query, which attends to block 3; all others attend to block 7."""
    q, k = torch.zeros(1, 1, 193, 2), torch.zeros(1, 1, 193, 2)
    q[..., 0], q[:, :, -1] = 9, torch.tensor([0.0, 9.0])
    k[:, :, 112:128, 0] = 1
    k[:, :, 48:64, 1] = 1
    prompt = Prompt(q, k, scale=1.0, block=16, tail=0)
    options = {"gamma": 0.3, "tau": 0, "min_budget": 0}
    blocks = pattern_of("flex_prefill", options).plan(prompt).to_block_mask()[0, 0]
    assert blocks[6:, 3].all()
    assert not blocks[9:12, 7].any()


def test_heads_of_flex_prefill_choose_by_how_well_means_predict():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 512, 16, generator=g) for _ in range(2))
    # Head 0: all tokens of a block are alike. Head 1: single keys stand out of their blocks.
    for x in (q, k):
        x[:, 0] = x[:, 0].unflatten(1, (-1, 16))[:, :, :1].expand(-1, -1, 16, -1).flatten(1, 2)
    k[:, 1] *= torch.where(torch.arange(512) % 37 == 0, 8, 0.1)[:, None]
    prompt = Prompt(q, k, scale=0.25, block=16, tail=0)
    options = {"gamma": 0.6, "min_budget": 0}
    chosen, blocks, slashes = (
        pattern_of("flex_prefill", {**options, "tau": tau}).plan(prompt).to_dense_mask()[0]
        for tau in (0.1, 2.0, 0.0)
    )
    assert torch.equal(chosen[0], blocks[0])
    assert torch.equal(chosen[1], slashes[1])
    assert not torch.equal(chosen[0], slashes[0])
    assert not torch.equal(chosen[1], blocks[1])


# -- boundary ----------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(prompt=prompts(), share=st.sampled_from([0.3, 0.8]), own=st.sampled_from([0.0, 0.6, 1.0]))
def test_boundary_is_its_definition(prompt, share, own):
    shares = {"image": {"text": own, "image": 0.2}, "audio": own}
    _, mask = check_plan(
        pattern_of("boundary", {"spans": SPANS, "share": share, "shares": shares}), prompt
    )
    of = ["text"] * prompt.kv_len
    for start, stop, name in SPANS:
        of[start:stop] = [name] * len(of[start:stop])
    block, offset = prompt.block, prompt.offset
    mass = antidiagonal_mass(prompt.q, prompt.k, block=block, stride=8, scale=prompt.scale)
    names = [set(of[j : j + block]) for j in range(0, prompt.kv_len, block)]
    kept = torch.zeros_like(mass, dtype=torch.bool)
    for i in range(prompt.num_q_blocks):
        rows = set(of[offset + i * block : offset + (i + 1) * block])
        for query in rows:
            for key in ("text", "image", "audio"):
                inner = shares.get(query, share)
                goal = inner.get(key, share) if isinstance(inner, dict) else inner
                blocks = [j for j in range(len(names)) if key in names[j]]
                for b, h in ((b, h) for b in range(len(mass)) for h in range(mass.shape[1])):
                    row = mass[b, h, i]
                    total, reached = sum(float(row[j]) for j in blocks), 0.0
                    for j in sorted(blocks, key=lambda j: -row[j]):
                        if goal == 1 or reached < goal * total - 1e-9:
                            kept[b, h, i, j] = True
                            reached += float(row[j])
    assert torch.equal(mask, read_blocks(prompt, kept | prompt.always()))


def test_a_share_of_1_reads_blocks_whose_mass_rounds_to_0():
    q, k = torch.zeros(1, 1, 96, 4), torch.zeros(1, 1, 96, 4)
    q[..., 0], k[:, :, :16, 0] = 60, 60
    prompt = Prompt(q, k, scale=1.0, block=16, tail=0)
    assert pattern_of("boundary", {"share": 1}).plan(prompt).density() == 1
    assert pattern_of("boundary", {"share": 0.999}).plan(prompt).density() < 1


def test_shares_decide_how_much_each_pair_reads():
    prompt = long_prompt()
    shares = {"image": {"image": 0.1, "text": 1}, "text": {"image": 0.9, "text": 0.1}}
    options = {"spans": [(256, 768, "image")], "shares": shares}
    mask = pattern_of("boundary", options).plan(prompt).to_dense_mask().double().mean((0, 1))
    image, text = slice(256, 768), slice(768, 1008)
    assert mask[image, :256].mean() == 1
    assert mask[text, image].mean() > 0.6
    assert mask[image, image].mean() < 0.25
    assert mask[text, 16:256].mean() < 0.25


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flex_prefill", {"gamma": 0}, "gamma=0"),
        ("flex_prefill", {"tau": -0.1}, "tau=-0.1.*>= 0"),
        ("flex_prefill", {"min_budget": -1}, "min_budget=-1.*>= 0"),
        ("grid", {"stride": 1}, "stride=1.*>= 2"),
        ("grid", {"stride": 5, "phase": 5}, "phase=5.*stride - 1"),
        ("grid", {"phase": 3}, "phase=3.*stride"),
        ("grid", {"sink": -1}, "sink=-1.*>= 0"),
        ("grid", {"window": 0}, "window=0.*>= 1"),
        ("grid", {"rows": True}, "rows=True.*stride"),
        ("grid", {"rows": 1, "stride": 5}, "rows=1.*True or False"),
        ("grid", {"min_gain": 2}, "min_gain=2"),
        ("boundary", {"spans": [(3, 3, "a")]}, "spans=.3, 3, 'a'.*0 <= start < stop"),
        ("boundary", {"spans": [(0, 9, "a"), (5, 12, "b")]}, "spans=.5, 12.*9 <= start"),
        ("boundary", {"spans": [(0, 9)]}, "spans=.0, 9"),
        ("boundary", {"spans": 5}, "spans=5"),
        ("boundary", {"share": 1.1}, "share=1.1"),
        ("boundary", {"spans": SPANS, "shares": {"image": -1}}, "shares=-1"),
        ("boundary", {"spans": SPANS, "shares": {"image": {"text": 2}}}, "shares=2"),
        ("boundary", {"spans": SPANS, "shares": {"imag": 1}}, "shares: 'imag'.*'image'"),
        (
            "boundary",
            {"spans": SPANS, "shares": {"text": {"vide": 1}}},
            "shares: 'vide'.*text, image, audio",
        ),
        ("boundary", {"shares": [1]}, "shares=.1.*mapping"),
        ("boundary", {"stride": 3}, "stride=3"),
        ("hybrid", {"top_p": 1.1}, "top_p=1.1"),
        ("hybrid", {"columns": -1}, "columns=-1.*>= 0"),
        ("hybrid", {"columns": 1.5}, "columns=1.5.*share"),
        ("triangle", {"window": 0.0}, "window=0.0.*share"),
        ("blocks", {"top_p": None, "count": 0}, "count=0.*>= 1"),
        ("blocks", {"topk": 0.5, "count": 3}, "topk=0.5.*count"),
        ("hybrid", {"scores": "mean"}, "scores='mean'.*xattention"),
        ("hybrid", {"stride": 7}, "stride=7.*16"),
        ("hybrid", {"queries": "first"}, "queries='first'.*spread"),
        ("hybrid", {"per_group": 1}, "per_group=1.*True or False"),
        ("vertical_slash", {"columns": 0}, "columns=0"),
        ("vertical_slash", {"columns": 1.5}, "columns=1.5"),
        ("vertical_slash", {"slashes": True}, "slashes=True"),
        ("vertical_slash", {"min_columns": -1}, "min_columns=-1.*>= 0"),
        ("vertical_slash", {"min_slashes": 0.5}, "min_slashes=0.5"),
        ("vertical_slash", {"last": 0}, "last=0.*>= 1"),
        ("xattention", {"top_p": 0}, "top_p=0"),
        ("xattention", {"stride": 4}, "stride=4.*16"),
    ],
)
def test_bad_options_are_refused(name, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        pattern_of(name, options)


@pytest.mark.parametrize("offset", [0, 1, 15, 16, 31])
def test_triangle_reads_its_window_at_every_offset_of_a_chunk(offset):
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64 + offset, 8)
    plan = pattern_of("triangle", {"sink": 0, "window": 48}).plan(
        Prompt(q, k, scale=1.0, block=16, tail=0)
    )
    at = torch.arange(64)[:, None] + offset
    keys = torch.arange(64 + offset)
    window = (keys <= at) & (keys > at - 48)
    assert bool(plan.to_dense_mask()[0, 0][window].all())
