import functools

import pytest
import torch
from torch._dynamo.utils import counters

from dit_accel.kernels import (
    LinearState,
    SparsePlan,
    block_scores,
    block_sparse_attention,
    sparse_linear_attention,
)
from dit_accel.kernels.block_sparse import library
from dit_accel.kernels.linear.mix import Mix

# No size of the first problem equals another by chance: dynamo would take them for one.
LENGTHS = (400, 130, 191, 200, 257, 300, 333, 410, 500, 512)
BLOCKS = {"block_q": 32, "block_k": 32}


def fresh_compiler():
    """Return a compiled function: one graph, dynamic shapes, empty caches and counters."""
    torch._dynamo.reset()
    counters.clear()
    return functools.partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")


def tensors(length, *, heads=10, kv_heads=5, d=24, requires_grad=False):
    g = torch.Generator().manual_seed(length)
    return [
        torch.randn(3, h, length, d, generator=g).requires_grad_(requires_grad)
        for h in (heads, kv_heads, kv_heads)
    ]


def routed(q, k, **options):
    scores = block_scores(q, k, **BLOCKS)
    return SparsePlan.from_scores(scores, q_len=q.shape[2], kv_len=k.shape[2], **BLOCKS, **options)


def operator_arguments(plan, q, k, v, *, feature_map, mix=None, backend="torch"):
    return (
        q,
        k,
        v,
        *(getattr(plan, name) for name in library.TENSORS),
        None,
        None,
        *(mix or Mix()),
        *(getattr(plan, name) for name in library.NUMBERS),
        0.2,
        False,
        feature_map,
        "complement",
        mix is None,
        backend,
    )


@pytest.mark.parametrize("feature_map", [None, "softmax"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(feature_map, requires_grad):
    q, k, v = tensors(100, requires_grad=requires_grad)
    arguments = operator_arguments(routed(q, k, topk=0.4), q, k, v, feature_map=feature_map)
    torch.library.opcheck(torch.ops.dit_accel.sparse_linear.default, arguments)


@pytest.mark.parametrize("mix", [Mix(torch.eye(24), torch.ones(24)), Mix(alpha=torch.ones(10))])
def test_opcheck_of_a_mix_at_inference(mix):
    q, k, v = tensors(100)
    arguments = operator_arguments(routed(q, k, topk=0.4), q, k, v, feature_map="elu", mix=mix)
    torch.library.opcheck(torch.ops.dit_accel.sparse_linear.default, arguments)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_opcheck_of_the_scoring_operator(spread, learned):
    q, k, _ = tensors(100)
    projection = torch.randn(10, 24, 24) if learned else None
    arguments = (q, k, None, None, projection, 32, 16, 0.2, True, spread)
    torch.library.opcheck(torch.ops.dit_accel.block_scores.default, arguments)


@pytest.mark.parametrize("skip", [None, 2])
@pytest.mark.parametrize("counted", [False, True])
def test_opcheck_of_the_selecting_operator(skip, counted):
    scores = torch.randn(1, 2, 4, 7, generator=torch.Generator().manual_seed(0))
    tensors = None, None, torch.tensor([100, 70], dtype=torch.int32), None
    tally = torch.zeros(3, dtype=torch.int64) if counted else None
    numbers = 32, 16, 100, 110, False, 0, None, 0, 2, 3, 0.7, None, skip, 1, None, 4, 4, 3, 5
    torch.library.opcheck(
        torch.ops.dit_accel.select_blocks.default, (scores, *tensors, tally, *numbers)
    )


def test_opcheck_of_the_pooling_operator():
    x = tensors(100)[0]
    torch.library.opcheck(torch.ops.dit_accel.pool_blocks.default, (x, 32, None))


@pytest.mark.parametrize(
    "options",
    [
        {"combine": "none"},
        {"combine": "shared_softmax"},
        {"combine": "proj", "proj_weight": torch.eye(24), "linear_scope": "all"},
        {"combine": "alpha", "alpha": torch.full((10,), 0.7)},
    ],
    ids=lambda options: options["combine"],
)
def test_one_graph_serves_ten_lengths(options):
    """Routing, planning and attention in one graph without a break, compiled once."""
    compile_ = fresh_compiler()

    def attend(q, k, v):
        return sparse_linear_attention(q, k, v, routed(q, k, topk=0.3, diagonal=0), **options)

    compiled = compile_(attend)
    for length in LENGTHS:
        q, k, v = tensors(length)
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_plan_made_outside_serves_ten_lengths_in_one_graph():
    compile_ = fresh_compiler()
    compiled = compile_(block_sparse_attention)
    for length in LENGTHS:
        q, k, v = tensors(length)
        plan = routed(q, k, topk=0.3, causal=True)
        torch.testing.assert_close(compiled(q, k, v, plan), block_sparse_attention(q, k, v, plan))
    assert counters["stats"]["unique_graphs"] == 1


def test_gradients_flow_through_a_compiled_graph_of_ten_lengths():
    compile_ = fresh_compiler()

    def loss(q, k, v, plan):
        o, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
        return (o.square().sum() + lse.sum()) / 100

    compiled = compile_(loss)
    for length in LENGTHS:
        inputs = tensors(length, requires_grad=True)
        plan = routed(*inputs[:2], topk=0.3)
        actual = torch.autograd.grad(compiled(*inputs, plan), inputs)
        expected = torch.autograd.grad(loss(*inputs, plan), inputs)
        torch.testing.assert_close(actual, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_planning_with_kv_lengths_compiles_whole():
    compile_ = fresh_compiler()

    def plan_density(scores, lengths, kv_len):
        plan = SparsePlan.from_scores(
            scores, q_len=kv_len, kv_len=kv_len, kv_lengths=lengths, top_p=0.6, **BLOCKS
        )
        return plan.density_tensor()

    compiled = compile_(plan_density)
    for length in LENGTHS:
        q, k, _ = tensors(length)
        scores, lengths = block_scores(q, k, **BLOCKS), torch.tensor([length, length - 40, 60])
        torch.testing.assert_close(
            compiled(scores, lengths, length), plan_density(scores, lengths, length)
        )
    assert counters["stats"]["unique_graphs"] == 1


def test_a_tally_is_kept_in_a_compiled_graph():
    tally, expected = (torch.zeros(3, dtype=torch.int64) for _ in range(2))

    def attend(q, k, v, tally):
        return block_sparse_attention(q, k, v, routed(q, k, top_p=0.5, limit=0.6, tally=tally))

    compiled = fresh_compiler()(attend)
    for length in LENGTHS[:4]:
        q, k, v = tensors(length)
        torch.testing.assert_close(compiled(q, k, v, tally), attend(q, k, v, expected))
        assert torch.equal(tally, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert tally[0] == 4


class Attention(torch.nn.Module):
    """Parameters and sizes are numbers, and lengths are symbolic."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(24, 24)
        self.alpha = torch.nn.Parameter(torch.full((10,), 0.5))

    def forward(self, q, k, v):
        plan = routed(q, k, topk=0.3, skip=0.2, kv_lengths=torch.full((3,), 50))
        mask = torch.ones(1, 10, plan.num_q_blocks, plan.num_k_blocks, dtype=torch.bool)
        lengths = {"q_len": q.shape[2], "kv_len": k.shape[2]}
        columns = torch.tensor([1]).expand(1, 10, 1)
        written = SparsePlan.from_block_mask(mask, columns=columns, **lengths, **BLOCKS)
        o = block_sparse_attention(q, k, v, written)
        o = o + sparse_linear_attention(
            q,
            k,
            v,
            plan,
            combine="proj",
            linear_scope="marginal",
            proj_weight=self.proj.weight,
            proj_bias=self.proj.bias,
        )
        return o + sparse_linear_attention(q, k, v, plan, combine="alpha", alpha=self.alpha)


def test_a_module_with_parameters_serves_many_lengths_in_one_graph():
    module = Attention()
    compiled = fresh_compiler()(module)
    for length in LENGTHS[:4]:
        inputs = tensors(length)
        torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_refreshing_a_state_compiles_whole():
    _, k, v = tensors(100)
    state = LinearState.from_keys(k, v)
    new = k[:, :, 5:10], v[:, :, 5:10], k[:, :, 10:15], v[:, :, 10:15]
    refreshed = fresh_compiler()(lambda state, *new: state.update(*new).kv)(state, *new)
    torch.testing.assert_close(refreshed, state.update(*new).kv)
