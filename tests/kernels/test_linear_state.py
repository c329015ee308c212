import re

import pytest
import torch

from dit_accel.kernels import (
    LinearState,
    SparsePlan,
    linear_attention,
    sparse_linear_attention,
)

from .attention_cases import FEATURE_MAPS, SCOPES


def keys(n, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, d, generator=g).to(dtype) for d in (8, 5)]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_refreshes_are_the_state_of_the_final_keys(feature_map, dtype):
    k, v = keys(200, dtype)
    state = LinearState.from_keys(k, v, feature_map=feature_map)
    g = torch.Generator().manual_seed(1)
    for step in range(50):
        tokens = torch.randperm(200, generator=g)[: 10 * (step % 8)]  # none, now and then
        k_new, v_new = keys(len(tokens), dtype, seed=2 + step)
        state.update_(k[:, :, tokens], v[:, :, tokens], k_new, v_new)
        k[:, :, tokens], v[:, :, tokens] = k_new, v_new
    anew = LinearState.from_keys(k.double(), v.double(), feature_map=feature_map)
    assert state.kv.dtype == torch.float32
    torch.testing.assert_close(state.kv.double(), anew.kv, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state.k.double(), anew.k, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_set_forgets_what_was_summed_and_keeps_the_memory(feature_map):
    state = LinearState.from_keys(*keys(20), feature_map=feature_map)
    kv = state.kv
    k, v = keys(30, seed=4)
    assert state.set_(k, v) is state
    expected = LinearState.from_keys(k, v, feature_map=feature_map)
    assert state.kv is kv
    torch.testing.assert_close(state.kv, expected.kv, rtol=0, atol=0)
    torch.testing.assert_close(state.k, expected.k, rtol=0, atol=0)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("kept", [False, True])
def test_linear_attention_is_the_branch_over_all_keys(feature_map, kept):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, generator=g, dtype=torch.float64) for h in (6, 3, 3))
    state = LinearState.from_keys(k, v, feature_map=feature_map) if kept else None
    o = linear_attention(q, k, v, feature_map=feature_map, state=state)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 0] = True
    plan = SparsePlan.from_block_mask(mask, block_q=16, block_k=16, q_len=40, kv_len=40)
    options = {"feature_map": feature_map, "linear_scope": "all"}
    projected = sparse_linear_attention(
        q, k, v, plan, combine="proj", proj_weight=torch.eye(8, dtype=q.dtype), **options
    )
    exact = sparse_linear_attention(q, k, v, plan, combine="none")
    torch.testing.assert_close(o, projected - exact)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_only_valid_keys_are_summed(feature_map):
    k, v = keys(20)
    lengths = torch.tensor([20, 7])
    expected = [LinearState.from_keys(k[i, None, :, :n], v[i, None, :, :n], feature_map=feature_map)
                for i, n in enumerate(lengths)]  # fmt: skip
    k[1, :, 7:] = v[1, :, 7:] = torch.nan
    state = LinearState.from_keys(k, v, feature_map=feature_map, kv_lengths=lengths)
    torch.testing.assert_close(state.kv, torch.cat([x.kv for x in expected]))
    torch.testing.assert_close(state.k, torch.cat([x.k for x in expected]))


def test_update_leaves_the_old_state_alone():
    k, v = keys(20)
    old = LinearState.from_keys(k, v)
    kept = old.kv.clone()
    new = old.update(k[:, :, :4], v[:, :, :4], k[:, :, 4:8], v[:, :, 4:8])
    assert torch.equal(old.kv, kept)
    assert not torch.equal(new.kv, kept)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_attention_with_kept_totals_is_attention_that_sums_itself(feature_map, scope):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 96, 16, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.rand(1, 4, 6, 6, generator=g) < 0.2
    plan = SparsePlan.from_block_mask(
        mask, block_q=16, block_k=16, q_len=96, kv_len=96, kv_lengths=torch.tensor([96, 50]),
        skip=torch.rand(1, 4, 6, 6, generator=g) < 0.2,
    )  # fmt: skip
    options = {"combine": "alpha", "alpha": torch.rand(4, generator=g, dtype=torch.float64)}
    options |= {"feature_map": feature_map, "linear_scope": scope}
    state = LinearState.from_keys(k, v, feature_map=feature_map, kv_lengths=plan.kv_lengths)
    with torch.no_grad():
        kept = sparse_linear_attention(q, k, v, plan, **options, state=state)
        summed = sparse_linear_attention(q, k, v, plan, **options)
    torch.testing.assert_close(kept, summed, rtol=1e-9, atol=1e-9)
    # The totals are what is used: others give another result.
    doubled = LinearState(2 * state.kv, state.k, feature_map)
    with torch.no_grad():
        other = sparse_linear_attention(q, k, v, plan, **options, state=doubled)
    assert not torch.allclose(other, summed, rtol=1e-3)


BAD_UPDATES = {
    "k_old with too few heads": ("k_old", 0, (2, 2, 4, 8)),
    "v_old of other tokens": ("v_old", 1, (2, 3, 5, 5)),
    "k_new of another width": ("k_new", 2, (2, 3, 4, 7)),
    "v_new without batch": ("v_new", 3, (3, 4, 5)),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_a_bad_refresh_is_named_and_changes_nothing(case, unchecked):
    name, place, shape = BAD_UPDATES[case]
    state = LinearState.from_keys(*keys(20))
    kept = state.kv.clone(), state.k.clone()
    arguments = [*keys(4), *keys(4)]
    arguments[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape(str(shape))}"):
        state.update_(*arguments)
    assert torch.equal(state.kv, kept[0])
    assert torch.equal(state.k, kept[1])


def test_bad_keys_are_named(unchecked):
    k, v = keys(20)
    with pytest.raises(ValueError, match=r"^v: .*\(2, 3, 3, 5\)"):
        LinearState.from_keys(k, v[:, :, :3])
    with pytest.raises(ValueError, match=r"^kv_lengths: .*\(1,\)"):
        LinearState.from_keys(k, v, kv_lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"^kv_lengths: .*21.*20"):
        LinearState.from_keys(k, v, kv_lengths=torch.tensor([1, 21]))
    with pytest.raises(ValueError, match=r"^k: .*int64"):
        LinearState.from_keys(k.long(), v)
    with pytest.raises(ValueError, match=r"^feature_map='hedgehog'"):
        LinearState.from_keys(k, v, feature_map="hedgehog")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["complement", "marginal"])
def test_rows_that_read_everything_have_an_empty_linear_set(scope, dtype):
    q, k, v = (torch.randn(1, 2, 150, 16, dtype=torch.float64).to(dtype) for _ in range(3))
    blocks = {"block_q": 16, "block_k": 16, "q_len": 150, "kv_len": 150}
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 10, 10, dtype=torch.bool), **blocks)
    options = {"combine": "proj", "linear_scope": scope, "proj_weight": torch.eye(16, dtype=dtype)}
    kept = sparse_linear_attention(
        q, k, v, plan, **options, state=LinearState.from_keys(k, v), backend="torch"
    )
    torch.testing.assert_close(kept, sparse_linear_attention(q, k, v, plan, **options))
