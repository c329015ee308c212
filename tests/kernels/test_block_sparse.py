import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels import (
    SparsePlan,
    block_scores,
    block_sparse_attention,
    sparse_linear_attention,
)
from dit_accel.kernels.block_sparse import chunks
from dit_accel.kernels.block_sparse.reference import block_sparse_reference

from ..tolerance import assert_kernel_close
from .plan_cases import DENSITIES, RULES, geometries, random_block_mask, visible_pairs

COMBINES = ("none", "shared_softmax")
UNORDERED = ("all", "kv_lengths", "ragged")  # rules that allow shared_softmax
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    plan: SparsePlan
    scale: float | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return fresh copies of q, k, v that require gradients, with the same strides."""
        return [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in self.qkv]


def make_inputs(batch, heads, kv_heads, q_len, kv_len, d, d_v, *, strided=False, seed=0):
    """Return random q, k, v in fp64. `strided`: with the memory layout `[B, L, H, D]` of diffusers."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len, d), (kv_heads, kv_len, d), (kv_heads, kv_len, d_v))
    if strided:
        return [
            torch.randn(batch, l, h, d, generator=g, dtype=torch.float64).transpose(1, 2)
            for h, l, d in shapes
        ]
    return [torch.randn(batch, *s, generator=g, dtype=torch.float64) for s in shapes]


@st.composite
def cases(draw, longest: int, rules=RULES) -> Case:
    batch = draw(st.integers(1, 2), label="batch")
    geometry = draw(geometries(longest, rules=rules, batch=batch))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * group
    seed = draw(st.integers(0, 2**16))
    d = draw(st.sampled_from([16, 24, 40, 64, 72, 80, 96]))
    leading = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    mask = random_block_mask(geometry, draw(st.sampled_from(DENSITIES)), leading, seed)
    plan = SparsePlan.from_block_mask(mask, **geometry)
    q, k, v = make_inputs(
        batch,
        heads,
        kv_heads,
        plan.q_len,
        plan.kv_len,
        d,
        draw(st.sampled_from([d, 16])),
        strided=draw(st.booleans()),
        seed=seed,
    )
    return Case(q, k, v, plan, draw(st.sampled_from([None, 0.2])))


def simple_case(density=0.5, *, heads=2, kv_heads=1, d=16, strided=False, **changes) -> Case:
    geometry = {"block_q": 16, "block_k": 16, "q_len": 70, "kv_len": 90, **changes}
    plan = SparsePlan.from_block_mask(
        random_block_mask(geometry, density, (1, heads), 5), **geometry
    )
    batch = len(changes.get("kv_lengths", [0, 0]))
    q_len, kv_len = plan.q_len, plan.kv_len
    return Case(*make_inputs(batch, heads, kv_heads, q_len, kv_len, d, d, strided=strided), plan)


def grads(outputs, leaves, seed=1) -> tuple[Tensor, ...]:
    """Return the gradients of `outputs` for random upstream gradients, the same in each call."""
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, leaves, upstream)


def run(case: Case, combine: str, leaves=None):
    """Return `(o, lse)`, or `(o,)` if the public function has no lse."""
    q, k, v = leaves or case.qkv
    if combine == "none":
        return block_sparse_attention(q, k, v, case.plan, scale=case.scale, return_lse=True)
    return (sparse_linear_attention(q, k, v, case.plan, combine=combine, scale=case.scale),)


def reference(case: Case, combine: str, leaves=None):
    q, k, v = leaves or case.qkv
    outputs = block_sparse_reference(q, k, v, case.plan, scale=case.scale, combine=combine)
    return outputs if combine == "none" else outputs[:1]


def assert_same(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


# -- forward and backward against the definition ---------------------------------------------------


@settings(max_examples=20)
@given(cases(500))
def test_forward_is_the_reference(case):
    assert_same(run(case, "none"), reference(case, "none"))


@settings(max_examples=20)
@given(cases(500, rules=UNORDERED))
def test_forward_with_summaries_is_the_reference(case):
    assert_same(run(case, "shared_softmax"), reference(case, "shared_softmax"))


@settings(max_examples=25)
@given(cases(200))
def test_gradients_through_o_and_lse_are_those_of_the_reference(case):
    ours, theirs = case.leaves(), case.leaves()
    expected = grads(reference(case, "none", theirs), theirs)
    assert_same(grads(run(case, "none", ours), ours), expected)


@settings(max_examples=25)
@given(cases(200, rules=UNORDERED))
def test_gradients_with_summaries_are_those_of_the_reference(case):
    ours, theirs = case.leaves(), case.leaves()
    expected = grads(reference(case, "shared_softmax", theirs), theirs)
    assert_same(grads(run(case, "shared_softmax", ours), ours), expected)


@settings(max_examples=8)
@given(cases(150))
def test_linear_attention_that_drops_the_unread_is_block_sparse_attention(case):
    o = sparse_linear_attention(*case.qkv, case.plan, combine="none", scale=case.scale)
    assert torch.equal(o, run(case, "none")[0])
    assert torch.equal(o, block_sparse_attention(*case.qkv, case.plan, scale=case.scale))


@pytest.mark.parametrize("combine", COMBINES)
def test_gradcheck(combine):
    mask = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    geometry = {"block_q": 1, "block_k": 2, "q_len": 3, "kv_len": 5}
    plan = SparsePlan.from_block_mask(mask[None, None], **geometry)
    case = Case(*make_inputs(1, 2, 1, 3, 5, 2, 1), plan)
    leaves = case.leaves()
    assert torch.autograd.gradcheck(lambda *x: run(case, combine, x), leaves)


def test_gradcheck_causal_with_kv_lengths_and_queries_without_keys():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    geometry = {"block_q": 2, "block_k": 2, "q_len": 4, "kv_len": 3, "causal": True}
    plan = SparsePlan.from_block_mask(mask, **geometry, kv_lengths=torch.tensor([3, 1]))
    case = Case(*make_inputs(2, 1, 1, 4, 3, 2, 1), plan)
    assert torch.autograd.gradcheck(lambda *x: run(case, "none", x)[0], case.leaves())


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_one_input_alone_gets_its_gradient(which):
    case = simple_case()
    every = case.leaves()
    expected = grads(run(case, "none", every), every)[which]
    leaves = [x.detach() for x in every]
    leaves[which].requires_grad_()
    assert_same(grads(run(case, "none", leaves), [leaves[which]]), [expected])


def test_lse_alone_is_differentiable():
    case = simple_case(1.0)
    ours, theirs = case.leaves(), case.leaves()
    actual = torch.autograd.grad(run(case, "none", ours)[1].sum(), ours)
    expected = torch.autograd.grad(reference(case, "none", theirs)[1].sum(), theirs[:2])
    assert_same(actual, (*expected, torch.zeros_like(case.v)))


def test_gradients_of_columns_where_one_block_is_a_strided_view():
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in make_inputs(1, 1, 2, 8, 8, 4, 4))
    q, k, v = q[:, :1], k[:, :2], v[:, :2]
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    plan = SparsePlan.from_block_mask(
        mask, block_q=16, block_k=k.shape[2], q_len=q.shape[2], kv_len=k.shape[2],
        columns=torch.tensor([[[1]]]),
    )  # fmt: skip
    assert torch.autograd.gradcheck(
        lambda *x: block_sparse_attention(*x, plan), (q[:, :1].repeat(1, 2, 1, 1), k, v)
    )


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("combine", "changes"),
    [("none", {}), ("none", {"causal": True}), ("shared_softmax", {})],
    ids=["none", "causal", "shared_softmax"],
)
def test_error_is_at_most_twice_that_of_plain_torch(dtype, combine, changes):
    exact = simple_case(
        heads=4, kv_heads=2, d=64, block_q=32, block_k=32, q_len=200, kv_len=230, **changes
    )
    rounded = [x.to(dtype) for x in exact.qkv]
    case = Case(*rounded, exact.plan)
    leaves = {"out": case.leaves(), "plain": case.leaves(), "reference": case.leaves(torch.float64)}
    out = run(case, combine, leaves["out"])
    plain = reference(case, combine, leaves["plain"])
    true = reference(case, combine, leaves["reference"])
    assert out[0].dtype == dtype
    assert all(lse.dtype == torch.float32 for lse in out[1:])
    outputs = {"out": out, "plain": plain, "reference": true}
    for i, name in enumerate(("o", "lse")[: len(out)]):
        assert_kernel_close(name, out[i], true[i], plain[i])
    back = {key: grads(x[:1], leaves[key]) for key, x in outputs.items()}
    assert all(x.dtype == dtype for x in back["out"])
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_kernel_close(name, back["out"][i], back["reference"][i], back["plain"][i])


# -- known answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
def test_reading_every_block_is_scaled_dot_product_attention(combine, dtype, strided):
    q, k, v = (x.to(dtype) for x in make_inputs(2, 4, 2, 130, 200, 64, 64, strided=strided))
    scores = block_scores(q, k, block_q=64, block_k=32)
    plan = SparsePlan.from_scores(scores, topk=1.0, block_q=64, block_k=32, q_len=130, kv_len=200)
    dense = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True)
    o = sparse_linear_attention(q, k, v, plan, combine=combine)
    torch.testing.assert_close(o, dense.to(dtype))


@pytest.mark.parametrize(("q_len", "kv_len"), [(130, 130), (50, 130), (130, 50)])
def test_causal_is_dense_attention_under_the_bottom_right_triangle(q_len, kv_len):
    n_q, n_k = -(-q_len // 16), -(-kv_len // 32)
    plan = SparsePlan.from_block_mask(
        torch.ones(1, 1, n_q, n_k, dtype=torch.bool),
        block_q=16,
        block_k=32,
        q_len=q_len,
        kv_len=kv_len,
        causal=True,
    )
    q, k, v = make_inputs(1, 2, 2, q_len, kv_len, 32, 32)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    dense = dense.masked_fill(~seen.any(-1)[:, None], 0.0)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan), dense, **EXACT)


def test_equal_keys_make_the_summaries_exact():
    case = simple_case(0.3)
    case.k = case.k[:, :, :1].expand_as(case.k)
    everything = F.scaled_dot_product_attention(*case.qkv, enable_gqa=True)
    torch.testing.assert_close(run(case, "shared_softmax")[0], everything, **EXACT)


def test_huge_scores_neither_overflow_nor_vanish():
    case = simple_case(0.7)
    case.q = case.q * 1e4
    outputs = run(case, "none")
    assert not any(x.isnan().any() for x in outputs)
    assert_same(outputs, reference(case, "none"))


# -- queries without a key -------------------------------------------------------------------------


EMPTY_ROWS = (
    {},
    {"kv_lengths": torch.tensor([90, 0])},
    {"q_block_sizes": torch.tensor([16, 3, 0, 16, 6])},
    {"k_block_sizes": torch.tensor([0, 0, 0, 0, 0, 0])},
    {"causal": True, "q_offset": -20},
    {"causal": True, "q_offset": -1000},
    {"causal": True, "kv_lengths": torch.tensor([3, 20])},
    {"causal": True, "q_offset": 60, "window": 5, "sink": 1},
)


@pytest.mark.parametrize(
    ("combine", "changes"),
    [("none", x) for x in EMPTY_ROWS]
    + [("shared_softmax", x) for x in EMPTY_ROWS if "causal" not in x],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) or "unread_rows",
)
def test_a_query_without_a_key_has_no_output_and_no_gradient(combine, changes):
    case = simple_case(0.5, **changes)
    seen = case.plan.to_dense_mask()
    if combine == "shared_softmax":  # an unread block is still summarised
        seen = visible_pairs({"block_q": 16, "block_k": 16, "q_len": 70, "kv_len": 90, **changes})
    empty = ~seen.any(-1).expand(case.q.shape[:3])
    if changes or combine == "none":
        assert empty.any()
    leaves = case.leaves()
    outputs = run(case, combine, leaves)
    back = grads(outputs, leaves)
    assert not any(x.isnan().any() for x in (*outputs, *back))
    assert not outputs[0][empty].any()
    if combine == "none":
        assert torch.equal(outputs[1] == -math.inf, empty)
    assert not back[0][empty].any()
    if empty.all():
        assert not any(x.any() for x in back)


# -- what is not read does not matter --------------------------------------------------------------


@settings(max_examples=15)
@given(case=cases(200), block=st.integers(0, 100), where=st.sampled_from("kv"))
def test_nan_in_a_block_stays_with_the_rows_that_read_it(case, block, where):
    plan = case.plan
    block %= plan.num_k_blocks
    clean = run(case, "none")
    poisoned = Case(case.q, case.k.clone(), case.v.clone(), plan, case.scale)
    tokens = slice(block * plan.block_k, (block + 1) * plan.block_k)
    getattr(poisoned, where)[:, :, tokens] = math.nan
    outputs = run(poisoned, "none")
    reads = plan.to_block_mask()[..., block].repeat_interleave(plan.block_q, -1)[..., : plan.q_len]
    away = ~reads.expand(case.q.shape[:3])
    for x, y in zip(outputs, clean, strict=True):
        assert torch.equal(x[away], y[away])
    if plan.to_dense_mask()[..., tokens].any():
        assert outputs[0].isnan().any()


@pytest.mark.parametrize("where", [(1,), (2,), (1, 2)], ids=["k", "v", "kv"])
def test_nan_in_a_block_that_nobody_reads_reaches_no_gradient(where):
    geometry = {"block_q": 16, "block_k": 16, "q_len": 70, "kv_len": 90}
    mask = random_block_mask(geometry, 0.5, (1, 2), 5)
    mask[..., 0] = False
    case = Case(*make_inputs(1, 2, 1, 70, 90, 16, 16), SparsePlan.from_block_mask(mask, **geometry))
    assert case.plan.kv_num_blocks.unique().tolist() == [0, 1]
    clean = case.leaves()
    expected = grads(run(case, "none", clean), clean)
    poisoned = case.leaves()
    for i in where:
        poisoned[i].data[:, :, :16] = math.nan
    actual = grads(run(case, "none", poisoned), poisoned)
    assert_same(actual, expected)
    assert not actual[1][:, :, :16].any()


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    "changes",
    [
        {"kv_lengths": torch.tensor([37, 90])},
        {"k_block_sizes": torch.tensor([16, 3, 0, 9, 16, 4])},
        {"q_block_sizes": torch.tensor([16, 3, 0, 9, 4])},
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_padding_holds_reaches_neither_outputs_nor_gradients(combine, changes):
    case = simple_case(0.6, **changes)
    k_valid = torch.arange(16) < case.plan.k_sizes()[..., None]
    k_valid = k_valid.flatten(1)[:, None, :90].expand(case.k.shape[:3])
    q_valid = (torch.arange(16) < case.plan.q_sizes()[:, None]).flatten()[:70]
    valid = (q_valid.expand(case.q.shape[:3]), k_valid, k_valid)
    clean, poisoned = case.leaves(), case.leaves()
    for x, keep in zip(poisoned, valid, strict=True):
        x.data[~keep] = math.nan
    expected, actual = run(case, combine, clean), run(case, combine, poisoned)
    assert_same(actual, expected)
    back = grads(actual, poisoned)
    assert_same(back, grads(expected, clean))
    assert not any(x[~keep].any() for x, keep in zip(back, valid, strict=True))


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "changes"), [("none", {}), ("shared_softmax", {}), ("none", {"causal": True})]
)
@pytest.mark.parametrize("chunk_scores", [1, 3000])
def test_small_chunks_and_stages_change_nothing(combine, changes, chunk_scores, monkeypatch):
    case = simple_case(0.5, heads=6, kv_heads=3, strided=True, **changes)
    leaves = case.leaves()
    expected = run(case, combine, leaves)
    back = grads(expected, leaves)
    monkeypatch.setattr(chunks, "CHUNK_SCORES", chunk_scores)
    monkeypatch.setattr(chunks, "STAGE_BYTES", 1)
    layout = chunks.Layout(case.plan, combine == "shared_softmax", torch.float64)
    stages = list(chunks.stages(case.q, case.k, layout, torch.float64))
    assert len(stages) == 6  # one per batch entry and key head
    leaves = case.leaves()
    outputs = run(case, combine, leaves)
    assert_same(outputs, expected)
    assert_same(grads(outputs, leaves), back)


class PeakMemory(TorchDispatchMode):
    """Peak number of bytes of all live tensors that were created inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: x for key, x in self.alive.items() if not x[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_the_memory_meter_sees_a_score_matrix():
    case = simple_case(q_len=500, kv_len=600)
    with PeakMemory() as memory:
        reference(case, "none")
    assert memory.peak >= case.q.shape[0] * 2 * 500 * 600 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("combine", "changes"),
    [("none", {}), ("none", {"causal": True, "window": 2000}), ("shared_softmax", {})],
    ids=["none", "window", "shared_softmax"],
)
def test_nothing_as_large_as_the_score_matrix_ever_exists(dtype, combine, changes):
    length = 4096
    q, k, v = (x.to(dtype) for x in make_inputs(1, 2, 1, length, length, 32, 32))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with PeakMemory() as memory:
        sizes = {"block_q": 64, "block_k": 64}
        plan = SparsePlan.from_scores(
            block_scores(q, k, **sizes), topk=0.3, q_len=length, kv_len=length, **sizes, **changes
        )
        plan.density()
        outputs = run(Case(q, k, v, plan), combine)
    assert memory.peak < length * length  # bytes: not even the mask of one head
    with PeakMemory() as memory:
        grads(outputs, leaves)
    assert memory.peak < length * length


# -- bad input -------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 64, 16)
PLAN = SparsePlan.from_block_mask(
    torch.ones(1, 1, 4, 4, dtype=torch.bool), block_q=16, block_k=16, q_len=64, kv_len=64
)


def plan_of(batch: int, heads: int) -> SparsePlan:
    mask = torch.ones(batch, heads, 4, 4, dtype=torch.bool)
    return SparsePlan.from_block_mask(mask, block_q=16, block_k=16, q_len=64, kv_len=64)


BAD = {
    "q without heads": ("q", {"q": X[0]}),
    "v without batch": ("v", {"v": X[0, 0]}),
    "q of integers": ("q", {"q": X.long()}),
    "k of another dtype": ("k", {"k": X.half()}),
    "v of another dtype": ("v", {"v": X.double()}),
    "v on another device": ("v", {"v": X.to("meta")}),
    "v shorter than k": ("v", {"v": X[:, :, :32]}),
    "v with fewer heads than k": ("v", {"v": X[:, :2]}),
    "k of another batch": ("k", {"k": X[:1], "v": X[:1]}),
    "k of another head size": ("k", {"k": X[..., :8]}),
    "heads that do not divide": ("q", {"k": X[:, :3], "v": X[:, :3]}),
    "no key heads": ("q", {"k": X[:, :0], "v": X[:, :0]}),
    "plan for other queries": ("plan", {"q": X[:, :, :48]}),
    "plan for other keys": ("plan", {"k": X[:, :, :48], "v": X[:, :, :48]}),
    "plan for another batch": ("plan", {"plan": plan_of(3, 1)}),
    "plan for other heads": ("plan", {"plan": plan_of(1, 2)}),
    "plan on another device": ("plan", {"plan": PLAN.to("meta")}),
}


@pytest.mark.parametrize("function", [block_sparse_attention, sparse_linear_attention])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(function, case, unchecked):
    name, changes = BAD[case]
    with pytest.raises(ValueError, match=rf"^{name}: "):
        function(**{"q": X, "k": X, "v": X, "plan": PLAN, **changes})


def test_an_unknown_combine_is_refused_by_name(unchecked):
    with pytest.raises(ValueError, match=r"^combine='sum': .*'none', 'shared_softmax'"):
        sparse_linear_attention(X, X, X, PLAN, combine="sum")


def test_a_block_mean_cannot_be_causal():
    case = simple_case(causal=True)
    with pytest.raises(ValueError, match=r"^combine='shared_softmax': .*causal"):
        run(case, "shared_softmax")


def test_chunks_mask_only_what_some_query_must_not_read(monkeypatch):
    from dit_accel.kernels.block_sparse import chunks

    monkeypatch.setattr(chunks, "CHUNK_SCORES", 2**13)  # a few rows of blocks, as in long prompts
    mask = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.4
    mask |= torch.eye(32, dtype=torch.bool)
    rules = {"block_q": 16, "block_k": 16, "q_len": 512, "kv_len": 512, "causal": True}
    columns = torch.arange(8).expand(1, 4, 8).int()
    plan = SparsePlan.from_block_mask(mask, **rules, columns=columns)
    masked = read = 0
    for chunk in chunks.Layout(plan, False, torch.float32).chunks(0, slice(0, 4), 2):
        rows = len(chunk.kv_rows) * 16 // (chunk.exact + chunk.tail_bias.shape[-1])
        masked += rows * (chunk.exact - chunk.free)
        read += rows * chunk.exact
        assert chunk.tail_bias.shape[1] == 1  # all queries of a block see the same columns
    assert 0 < masked < read / 2
