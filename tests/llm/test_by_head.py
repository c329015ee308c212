"""Patterns of single heads: one plan for the layer, equal to the plans that the heads would have alone."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import llm
from dit_accel.kernels import SparsePlan
from dit_accel.kernels.plan_join import join_heads
from dit_accel.llm.prefill import pattern_names, pattern_of
from dit_accel.llm.settings import prefill_settings

from .models import make, prompt
from .prompts import causal, check_plan, prompts

CHOICES = {
    "near": {"pattern": "triangle", "options": {"sink": 8, "window": 20}},
    "blocks": {"pattern": "blocks", "options": {"top_p": 0.4}},
    "scattered": {"pattern": "hybrid", "options": {"top_p": 0.3, "columns": 5}},
    "shared": {"pattern": "hybrid", "options": {"top_p": 0.3, "columns": 3, "per_group": True}},
    "slashes": {
        "pattern": "vertical_slash",
        "options": {"columns": 0.05, "slashes": 0.1, "min_columns": 2},
    },
    "video": {
        "pattern": "grid",
        "options": {"stride": 7, "phase": 2, "window": 20, "rows": True},
    },
}
NAMES = [*CHOICES, "dense", "triangle"]
SMALL = {"block": 16, "tail": 16, "crossover": 0, "dense_layers": 0}


def alone(prompt, names, head):
    """Mask of one query head whose pattern is asked for nothing but this head, `[B, Lq, Lk]`."""
    group = prompt.q.shape[1] // prompt.k.shape[1]
    if names[head] == "dense":
        return causal(prompt).expand(len(prompt.q), -1, -1)
    some = dataclasses.replace(
        prompt, q=prompt.q[:, head : head + 1], k=prompt.k[:, head // group : head // group + 1]
    )
    choice = CHOICES.get(names[head], {"pattern": names[head], "options": {}})
    plan = pattern_of(choice["pattern"], choice["options"]).plan(some)
    return plan.to_dense_mask()[:, 0].expand(len(prompt.q), -1, -1)


@given(prompt=prompts(), data=st.data())
def test_each_head_reads_what_its_pattern_reads(prompt, data):
    heads = prompt.q.shape[1]
    names = data.draw(st.lists(st.sampled_from([x for x in NAMES if x != "shared"]), min_size=heads, max_size=heads))  # fmt: skip
    _, mask = check_plan(pattern_of("by_head", {"heads": names, "choices": CHOICES}), prompt)
    for head in range(heads):
        assert torch.equal(mask[:, head], alone(prompt, names, head))


@given(prompt=prompts(), data=st.data())
def test_groups_of_heads_have_patterns_too(prompt, data):
    groups = prompt.k.shape[1]
    group = prompt.q.shape[1] // groups
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=groups, max_size=groups))
    options = {"heads": names, "choices": CHOICES, "by": "group"}
    plan, mask = check_plan(pattern_of("by_head", options), prompt)
    if set(names) <= {"shared", "near", "dense", "triangle"}:
        assert plan.heads in (1, groups)
    for i, name in enumerate(names):
        own = slice(i * group, (i + 1) * group)
        if name == "dense":
            assert torch.equal(mask[:, own], causal(prompt).expand_as(mask[:, own]))
            continue
        some = dataclasses.replace(prompt, q=prompt.q[:, own], k=prompt.k[:, i : i + 1])
        choice = CHOICES.get(name, {"pattern": name, "options": {}})
        plan = pattern_of(choice["pattern"], choice["options"]).plan(some)
        expected = plan.for_heads(group).to_dense_mask()
        assert torch.equal(mask[:, own], expected.expand_as(mask[:, own]))


def test_plans_with_other_rules_do_not_join():
    rules = {"block_q": 16, "block_k": 16, "q_len": 32, "kv_len": 32, "causal": True}
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    plain, window = (SparsePlan.from_block_mask(mask, **rules, **x) for x in ({}, {"window": 9}))
    with pytest.raises(ValueError, match=r"plans: .*window=9.*window=None"):
        join_heads([plain, window], [[0], [1]])
    with pytest.raises(ValueError, match=r"heads=\[\[0\], \[2\]\]"):
        join_heads([plain, plain], [[0], [2]])
    skip = SparsePlan.from_block_mask(mask, **rules, skip=~mask)
    with pytest.raises(ValueError, match=r"plans: .*skip_num_blocks"):
        join_heads([plain, skip], [[0], [1]])


def settings(**options):
    return {"pattern": "by_head", "options": {"choices": CHOICES, **options}, **SMALL}


MIXED = settings(heads=["near", "scattered", "slashes", "dense"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_they_give_alone(side):
    model, ids = make("Llama"), prompt(rows=2, length=180)
    llm.enable(model, prefill=MIXED)
    mask = torch.ones_like(ids)
    real = slice(0, 130) if side == "right" else slice(50, 180)
    mask[1] = 0
    mask[1, real] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(ids, attention_mask=mask, position_ids=positions).logits
        first, second = model(ids[:1]).logits, model(ids[1:, real]).logits
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1:, real], second, rtol=1e-4, atol=1e-5)
    found = llm.summary(model)
    assert found.sparse_calls == 9
    assert all(0.2 < x.density < 0.9 for x in found.layers)


def test_all_heads_dense_is_dense_attention():
    model, ids = make("Llama"), prompt(length=180)
    with torch.no_grad():
        expected = model(ids).logits
        found = llm.enable(model, prefill=settings(heads=["dense"] * 4))(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "heads=.*a list"),
        ({"heads": []}, "heads=.*a list"),
        ({"heads": ["nea"]}, "heads: 'nea'.*'near'"),
        ({"heads": ["near"], "by": "layer"}, "by='layer'"),
        ({"heads": ["a_shape"]}, "choices.'a_shape'.: a_shape.*hybrid"),
        ({"heads": ["near"], "choices": {"near": {"pattern": "by_head"}}}, "by_head.*hybrid"),
        ({"heads": ["near"], "choices": {"near": {"name": "hybrid"}}}, "choices.'near'.=.*mapping"),
        (
            {"heads": ["near"], "choices": {"near": {"pattern": "hybrit"}}},
            "pattern='hybrit'.*'hybrid'",
        ),
        (
            {
                "heads": ["near"],
                "choices": {"near": {"pattern": "hybrid", "options": {"top_p": 2}}},
            },
            "choices.'near'.: top_p=2",
        ),
    ],
)
def test_bad_options_are_named(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        pattern_of("by_head", {"choices": CHOICES, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ["near"] * 3}, "heads has 3 entries.* 4 query heads"),
        ({"heads": ["near"] * 4, "by": "group"}, "heads has 4 entries.* 2 KV heads"),
    ],
)
def test_another_number_of_heads_is_refused_before_a_call(options, message):
    model = make("Llama")
    with pytest.raises(ValueError, match=message):
        llm.enable(model, prefill=settings(**options))
    with pytest.raises(ValueError, match="model: not enabled"):
        llm.summary(model)


def test_its_name_alone_is_no_setting():
    assert "by_head" not in pattern_names()
    with pytest.raises(ValueError, match=r"heads=\(\)"):
        prefill_settings("by_head")
