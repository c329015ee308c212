"""Every mode of the Triton kernels on a GPU: accuracy, operators, CUDA graphs, memory."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from dit_accel.kernels import (
    LinearState,
    SparsePlan,
    block_scores,
    block_sparse_attention,
    sparse_linear_attention,
)
from dit_accel.kernels.block_sparse.reference import (
    block_sparse_reference,
    sparse_linear_reference,
)
from dit_accel.kernels.lut_attention import lut_attention
from dit_accel.kernels.lut_attention.reference import lut_reference

from ..kernels.attention_cases import (
    SCOPES,
    Problem,
    assert_half_close,
    assert_results_close,
    problems,
)

pytestmark = pytest.mark.gpu


def on_gpu(problem: Problem) -> Problem:
    options = {
        name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()
    }
    tensors = (x.cuda() for x in (problem.q, problem.k, problem.v))
    return Problem(*tensors, problem.plan.to("cuda"), options)


# Each example compiles kernels of its own, so there are few, and none are shrunk.
few = settings(
    max_examples=12,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


@pytest.mark.parametrize("combine", ["none", "shared_softmax", "proj", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_drawn_problems(dtype, combine):
    @few
    @given(problems(300, combines=(combine,), blocks=(64, 128), head_dims=(64, 72, 96, 128)))
    def check(drawn):
        drawn = on_gpu(drawn)
        if dtype == torch.float32:
            expected = drawn.results(torch.float64, "reference")
            assert_results_close(drawn.results(dtype, "triton"), expected, 1e-5)
        else:
            assert_half_close(drawn, dtype, "triton")

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("combine", ["none", "shared_softmax", "alpha"])
def test_head_dim_256(combine, dtype):
    @settings(few, max_examples=2)
    @given(problems(200, combines=(combine,), blocks=(64,), head_dims=(256,)))
    def check(drawn):
        drawn = on_gpu(drawn).rounded(dtype)
        expected = drawn.results(torch.float64, "reference")
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert_results_close(drawn.results(dtype, "triton"), expected, tolerance)

    check()


def wan(tokens: int, *, heads=12, d=128, dtype=torch.bfloat16, seed=0):
    """Return q, k, v in the layout of Wan2.1, and an SLA plan of 5 % of the blocks."""
    g = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(1, tokens, heads, d, generator=g, device="cuda", dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    blocks = {"block_q": 128, "block_k": 64}
    plan = SparsePlan.from_scores(
        block_scores(q, k, **blocks), topk=0.05, q_len=tokens, kv_len=tokens, **blocks
    )
    return q, k, v, plan


COMBINES = {
    "none": {"combine": "none"},
    "shared_softmax": {"combine": "shared_softmax"},
    **{scope: {"combine": "proj", "linear_scope": scope} for scope in SCOPES},
}


def options_of(name: str, d: int = 128, dtype=torch.bfloat16) -> dict:
    weight = {}
    if COMBINES[name]["combine"] == "proj":
        weight["proj_weight"] = torch.eye(d, device="cuda", dtype=dtype) * 0.5
    return {**COMBINES[name], **weight}


@pytest.mark.parametrize("name", COMBINES)
def test_relative_error_in_bf16_is_within_one_percent(name):
    q, k, v, plan = wan(4000, heads=3)
    options = options_of(name)
    o = sparse_linear_attention(q, k, v, plan, **options).float()
    exact = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    expected = sparse_linear_reference(q.float(), k.float(), v.float(), plan, **exact)
    assert (o - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("name", COMBINES)
def test_a_cuda_graph_replays_routing_planning_and_attention(name):
    q, k, v, _ = wan(2000, heads=2)
    options, blocks = options_of(name), {"block_q": 128, "block_k": 64}

    def step():
        plan = SparsePlan.from_scores(
            block_scores(q, k, **blocks), topk=0.1, q_len=2000, kv_len=2000, **blocks
        )
        return sparse_linear_attention(q, k, v, plan, **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = step()
    for seed in (1, 2):
        for x, new in zip((q, k, v), wan(2000, heads=2, seed=seed)[:3], strict=True):
            x.copy_(new)
        graph.replay()
        torch.testing.assert_close(out, step(), rtol=0, atol=0)


@pytest.mark.parametrize("name", COMBINES)
def test_forward_and_backward_never_wait_for_the_device(name):
    q, k, v, plan = wan(2000, heads=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = options_of(name)
    torch.autograd.grad(sparse_linear_attention(q, k, v, plan, **options).sum(), leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        blocks = {"block_q": 128, "block_k": 64}
        plan = SparsePlan.from_scores(
            block_scores(q, k, **blocks), topk=0.05, q_len=2000, kv_len=2000, **blocks
        )
        torch.autograd.grad(sparse_linear_attention(q, k, v, plan, **options).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", COMBINES)
def test_memory_beyond_dense_flash_attention_is_at_most_a_fifth(name):
    q, k, v, plan = wan(16384)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = options_of(name)

    def peak(attend) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(attend().sum(), leaves)
        return torch.cuda.max_memory_allocated() - before

    backends = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    with backends:
        dense = peak(lambda: torch.nn.functional.scaled_dot_product_attention(*leaves))
    sparse = peak(lambda: sparse_linear_attention(*leaves, plan, **options))
    assert sparse <= 1.2 * dense


@pytest.mark.parametrize("name", COMBINES)
def test_compiled_whole_with_gradients(name):
    q, k, v, plan = wan(1000, heads=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = options_of(name)

    def attend(q, k, v):
        return sparse_linear_attention(q, k, v, plan, **options)

    compiled = torch.compile(attend, fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves).float().square().sum(), leaves),
        torch.autograd.grad(attend(*leaves).float().square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("scope", SCOPES)
def test_totals_that_the_caller_keeps(scope):
    q, k, v, plan = wan(2000, heads=2)
    options = {"combine": "alpha", "alpha": torch.full((2,), 0.5, device="cuda")}
    state = LinearState.from_keys(k, v)
    with torch.no_grad():
        kept = sparse_linear_attention(
            q, k, v, plan, **options, linear_scope=scope, state=state
        ).float()
        summed = sparse_linear_attention(q, k, v, plan, **options, linear_scope=scope).float()
    torch.testing.assert_close(kept, summed, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("rotated", [False, True], ids=["as they are", "rotated"])
def test_look_up_attention(rotated, padded, dtype):
    """Llama-3.1-8B at 16K: 8 heads of keys, 4 queries each, 4 bits a value."""
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 8, 4, 128, generator=g, device="cuda").to(dtype)
    codes = torch.randint(256, (2, 1, 8, 16384, 64), generator=g, device="cuda").byte()
    books = torch.randn(2, 1, 64, 256, 2, generator=g, device="cuda")
    visible = torch.rand(1, 1, 16384, generator=g, device="cuda") < 0.7 if padded else None
    rope = {}
    if rotated:
        rope["positions"] = torch.arange(16384, dtype=torch.int32, device="cuda").view(1, 1, -1)
        rope["frequencies"] = 5e5 ** -torch.linspace(0, 1, 64, device="cuda")
    found = lut_attention(q, *codes, *books, scale=0.09, visible=visible, **rope)
    want = lut_reference(q.double(), *codes, *books, 0.09, visible, **rope)
    # Angles of 32 bits are right to 1e-5 here.
    near = 1e-4 if rotated else 1e-5
    close = near if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0].double(), want[0], rtol=close, atol=close)
    torch.testing.assert_close(found[1].double(), want[1], rtol=near, atol=near)
    again = lut_attention(q, *codes, *books, scale=0.09, visible=visible, **rope)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("group", [3, 4, 8])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("q_len", [2, 1000])
def test_query_heads_that_share_their_lists(q_len, d, group):
    """Inference computes several heads in one tile."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, n, h, d, generator=g, device="cuda").bfloat16().transpose(1, 2)
        for n, h in ((q_len, 2 * group), (5000, 2), (5000, 2))
    )
    blocks = {"block_q": 64, "block_k": 64, "q_len": q_len, "kv_len": 5000}
    mask = torch.rand(1, 2, -(-q_len // 64), 79, generator=g, device="cuda") < 0.3
    columns = torch.arange(5, 5000, 90, device="cuda", dtype=torch.int32).expand(1, 2, -1)
    plan = SparsePlan.from_block_mask(mask, **blocks, causal=True, columns=columns)
    o = block_sparse_attention(q, k, v, plan, backend="triton").float()
    expected, _ = block_sparse_reference(q.float(), k.float(), v.float(), plan.for_heads(2 * group))
    assert (o - expected).norm() <= 1e-2 * expected.norm()


def test_repeats_are_bit_equal():
    q, k, v, plan = wan(4000)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = options_of("complement")
    first, second = (
        torch.autograd.grad(sparse_linear_attention(q, k, v, plan, **options).sum(), leaves)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_operators_pass_opcheck():
    from ..compile.test_operators import operator_arguments

    q, k, v, plan = wan(300, heads=2, d=64, dtype=torch.float32)
    for feature_map in (None, "softmax"):
        arguments = operator_arguments(plan, q, k, v, feature_map=feature_map, backend="triton")
        torch.library.opcheck(torch.ops.dit_accel.sparse_linear.default, arguments)
