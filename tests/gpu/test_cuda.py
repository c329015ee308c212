"""Attention on a GPU against the fp64 reference, and a whole pipeline."""

import numpy as np
import pytest
import torch

from dit_accel.kernels import SparsePlan, block_scores, sparse_linear_attention
from dit_accel.kernels.block_sparse.reference import block_sparse_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("combine", ["none", "shared_softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_and_gradients_on_cuda(combine, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = [
        torch.randn(2, h, n, 64, generator=generator) for h, n in ((4, 300), (2, 517), (2, 517))
    ]
    q, k, v = (x.to("cuda", dtype).requires_grad_() for x in wide)
    scores = block_scores(q, k, block_q=64, block_k=64)
    plan = SparsePlan.from_scores(scores, topk=0.4, block_q=64, block_k=64, q_len=300, kv_len=517)
    out = sparse_linear_attention(q, k, v, plan, combine=combine)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference, _ = block_sparse_reference(*exact, plan, combine=combine)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(out.double(), reference, atol=tolerance, rtol=tolerance)
    gradient = torch.randn(out.shape, generator=generator).to("cuda", dtype)
    grads = torch.autograd.grad(out, (q, k, v), gradient)
    expected = torch.autograd.grad(reference, exact, gradient.double())
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5 * tolerance, rtol=5 * tolerance)


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "model-offload"])
def test_pipeline_on_cuda_equals_dense_at_topk_one(sparse_wan, call, offload):
    pipe = sparse_wan(sla={"topk": 1.0})
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda")
    for _ in range(2):
        sparse = pipe(**call()).frames.float().cpu().numpy()
        assert pipe.summary(strict=True).sparse_calls > 0
    pipe.disable()
    np.testing.assert_allclose(sparse, pipe(**call()).frames.float().cpu().numpy(), atol=1e-3)
