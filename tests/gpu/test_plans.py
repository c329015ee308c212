"""Router and selection on a GPU against the reference implementation on a CPU."""

import pytest
import torch

from dit_accel.kernels import Geometry, SparsePlan, block_scores

pytestmark = pytest.mark.gpu

CRITERIA = {
    "topk": {"topk": 0.1},
    "skip": {"topk": 0.05, "skip": 0.3, "sink_blocks": 1, "diagonal": 1},
    "top_p": {"top_p": 0.4, "limit": 0.5},
    "threshold": {"threshold": 0.5},
    "tail": {"topk": 0.1, "tail_blocks": 2},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [False, True])
def test_scores_equal_those_of_a_cpu_and_repeat(dtype, spread):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3000, 4, 72, generator=g).to(dtype).transpose(1, 2)
    k = torch.randn(2, 4100, 2, 72, generator=g).to(dtype).transpose(1, 2)
    options = {"block_q": 128, "block_k": 64, "spread": spread}
    expected = block_scores(q, k, **options)
    found, again = (block_scores(q.cuda(), k.cuda(), **options) for _ in range(2))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, again)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("n_k", [40, 700, 5000, 9000])
@pytest.mark.parametrize("ties", [False, True])
def test_lists_equal_those_of_a_cpu(criterion, n_k, ties):
    options = CRITERIA[criterion]
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, n_k - options.get("tail_blocks", 0), generator=g)
    scores = (4 * scores).round() / 4 if ties else scores
    lengths = {"block_q": 64, "block_k": 64, "q_len": 300, "kv_len": 64 * n_k - 9}
    plans = []
    for device in ("cpu", "cuda"):
        tally = torch.zeros(3, dtype=torch.int64, device=device)
        geometry = Geometry.of(device, **lengths, kv_lengths=torch.tensor([64 * n_k - 9, 1000]))
        plan = SparsePlan.from_scores(scores.to(device), geometry=geometry, tally=tally, **options)
        plans.append((plan, tally.cpu()))
    (expected, counted), (found, tally) = plans
    assert torch.equal(tally, counted)
    assert found.row_bound == expected.row_bound
    for name in ("kv", "full_kv", "skip"):
        counts = getattr(expected, f"{name}_num_blocks")
        if counts is not None:
            assert torch.equal(getattr(found, f"{name}_num_blocks").cpu(), counts)
            indices = getattr(expected, f"{name}_indices")
            listed = getattr(found, f"{name}_indices").cpu()
            assert torch.equal(listed[..., : indices.shape[-1]], indices)
            assert not listed[..., indices.shape[-1] :].any()


def test_router_and_plan_are_captured_in_a_graph():
    q, k = (torch.randn(1, 4, 4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tally = torch.zeros(3, dtype=torch.int64, device="cuda")
    blocks = {"block_q": 128, "block_k": 64}

    def plan():
        scores = block_scores(q, k, spread=True, **blocks)
        return SparsePlan.from_scores(
            scores, topk=0.1, q_len=4096, kv_len=4096, tally=tally, **blocks
        )

    plan()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan()
    q.copy_(torch.randn_like(q))
    tally.zero_()
    graph.replay()
    counted = tally.tolist()
    assert captured.equals(plan())
    assert counted[0] == 1
    assert tally.tolist() == [2 * n for n in counted]
