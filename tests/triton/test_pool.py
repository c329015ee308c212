"""Pooling kernel against the reference implementation in torch."""

import pytest
import torch

from dit_accel.kernels.router.pool import pool_launch
from dit_accel.kernels.router.pooling import moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("length", "block"),
    [(21, 1), *((length, block) for length in (1, 63, 200) for block in (10, 64, 128))],
)
@pytest.mark.parametrize("with_sizes", [False, True])
def test_pooling_is_the_mean_of_valid_tokens_and_of_their_squares(dtype, block, length, with_sizes):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, 3, 24, generator=g).to(dtype).transpose(1, 2)
    n = -(-length // block)
    sizes = None
    if with_sizes:
        tail = (length - torch.arange(n) * block).clamp(max=block)
        sizes = (torch.rand(2, n, generator=g) * (tail + 1)).int()
    expected = moments(x, block, sizes)
    if sizes is not None:  # what padding holds does not matter
        token = torch.arange(length)
        padding = token % block >= sizes[:, token // block]
        x = x.masked_fill(padding[:, None, :, None], torch.nan)
    out, squares = (torch.full_like(y, torch.nan) for y in expected)
    pool_launch(x, out, sizes, block)()
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-6)
    pool_launch(x, out.fill_(torch.nan), sizes, block, squares)()
    torch.testing.assert_close((out, squares), expected, rtol=1e-5, atol=1e-6)
