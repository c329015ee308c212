"""The dense Triton kernel of the GPU check equals SDPA."""

import pytest
import torch

from dit_accel.bench.gpu.dense import DenseTile, dense_attention


@pytest.mark.parametrize("tile", [DenseTile(32, 32, 1, 1), DenseTile(64, 16, 1, 1)], ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(64, 64), (70, 45), (1, 129)])
def test_equals_sdpa(tile, q_len, k_len):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 32).half().transpose(1, 2) for n in (q_len, k_len, k_len))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(
        dense_attention(q, k, v, tile).float(), expected, atol=4e-3, rtol=4e-3
    )


@pytest.mark.parametrize("d", [8, 24])
def test_refuses_what_the_kernel_does_not_take(d):
    q = torch.randn(1, 1, 16, d).half()
    with pytest.raises(ValueError, match=f"q: head_dim {d}"):
        dense_attention(q, q, q, DenseTile(32, 32, 1, 1))
