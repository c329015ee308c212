import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.kernels.router import block_scores, pool_blocks
from dit_accel.kernels.router.pooling import moments

BLOCKS = st.sampled_from([1, 16, 48, 64])


def brute_pool(x: Tensor, block: int, sizes: list[list[int]] | None = None) -> Tensor:
    """Return the mean of the valid tokens of each block, computed one block at a time, in fp64."""
    out = x.new_zeros(*x.shape[:2], -(-x.shape[2] // block), x.shape[3], dtype=torch.float64)
    for b in range(x.shape[0]):
        for i in range(out.shape[2]):
            tokens = x[b, :, i * block : (i + 1) * block].double()
            if sizes is not None:
                tokens = tokens[:, : sizes[b % len(sizes)][i]]
            if tokens.shape[1]:
                out[b, :, i] = tokens.mean(1)
    return out


@st.composite
def pooled_inputs(draw):
    """Draw a tensor and a block size, and in half of the cases numbers of valid tokens per block."""
    block, length, batch = draw(BLOCKS), draw(st.integers(1, 200)), draw(st.integers(1, 2))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(batch, length, 3, 8, generator=g, dtype=torch.float64).transpose(1, 2)
    sizes = None
    if draw(st.booleans()):
        n = -(-length // block)
        most = [min(block, length - i * block) for i in range(n)]
        row = st.tuples(*(st.integers(0, m) | st.just(m) for m in most)).map(list)
        rows = draw(st.sampled_from([1, batch]))
        sizes = draw(st.lists(row, min_size=rows, max_size=rows))
    return x, block, sizes


@given(pooled_inputs())
def test_pooling_is_the_mean_of_the_valid_tokens(inputs):
    x, block, sizes = inputs
    pooled = pool_blocks(x, block, None if sizes is None else torch.tensor(sizes))
    torch.testing.assert_close(pooled, brute_pool(x, block, sizes))


@given(pooled_inputs())
def test_moments_are_the_means_of_the_valid_tokens_and_of_their_squares(inputs):
    x, block, sizes = inputs
    mean, square = moments(x, block, None if sizes is None else torch.tensor(sizes))
    torch.testing.assert_close(mean, brute_pool(x, block, sizes))
    torch.testing.assert_close(square, brute_pool(x.square(), block, sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_squares_of_half_types_are_those_of_the_same_values(dtype, generator):
    # More tokens than one part holds whose squares are computed at a time.
    x = (300 * torch.randn(1, 3, 4000, 128, generator=generator)).to(dtype)
    square = moments(x, 64)[1]
    assert square.dtype == torch.float32
    torch.testing.assert_close(square, brute_pool(x.double().square(), 64).float())


@pytest.mark.parametrize("sizes", [[16, 16, 5], [16, 16, 0], [3, 0, 5]], ids=str)
def test_what_padding_holds_is_never_pooled(sizes, generator):
    x = torch.randn(1, 2, 40, 8, generator=generator)
    expected = brute_pool(x, 16, [sizes])
    for i, size in enumerate(sizes):
        x[:, :, i * 16 + size : (i + 1) * 16] = torch.nan
    squares = brute_pool(x.nan_to_num().square(), 16, [sizes])
    pooled = pool_blocks(x, 16, torch.tensor([sizes]))
    torch.testing.assert_close(pooled, expected.float())
    found = moments(x, 16, torch.tensor([sizes]))
    torch.testing.assert_close(found, (expected.float(), squares.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [None, [[64, 10, 20]]], ids=["all", "sizes"])
def test_half_types_pool_like_fp32_of_the_same_values(dtype, sizes, generator):
    x = torch.randn(2, 3, 150, 16, generator=generator).to(dtype)
    sizes = None if sizes is None else torch.tensor(sizes)
    pooled = pool_blocks(x, 64, sizes)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, pool_blocks(x.float(), 64, sizes), rtol=1e-6, atol=1e-6)


@given(
    block_q=BLOCKS,
    block_k=BLOCKS,
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    group=st.integers(1, 3),
    scale=st.sampled_from([None, 0.3]),
)
def test_scores_are_scaled_dot_products_of_block_means(
    block_q, block_k, q_len, kv_len, group, scale
):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2 * group, q_len, 8, generator=g, dtype=torch.float64)
    k = torch.randn(2, 2, kv_len, 8, generator=g, dtype=torch.float64)
    scores = block_scores(q, k, block_q=block_q, block_k=block_k, scale=scale)
    means = brute_pool(k, block_k).repeat_interleave(group, 1)
    expected = brute_pool(q, block_q) @ means.mT * (scale or 8**-0.5)
    torch.testing.assert_close(scores, expected)


@given(
    block_q=BLOCKS,
    block_k=BLOCKS,
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    group=st.integers(1, 3),
    loud=st.sampled_from([0.5, 3.0]),
)
def test_spread_adds_what_normal_logits_bring(block_q, block_k, q_len, kv_len, group, loud):
    g = torch.Generator().manual_seed(0)
    q = loud * torch.randn(2, 2 * group, q_len, 8, generator=g, dtype=torch.float64)
    k = loud * torch.randn(2, 2, kv_len, 8, generator=g, dtype=torch.float64) + 5
    blocks = {"block_q": block_q, "block_k": block_k}
    found = block_scores(q, k, spread=True, **blocks) - block_scores(q, k, **blocks)
    centred = k.clone()
    for start in range(0, kv_len, block_k):
        part = centred[:, :, start : start + block_k]
        part -= part.mean(2, keepdim=True)
    variance = brute_pool(centred.square(), block_k).repeat_interleave(group, 1)
    s = brute_pool(q.square(), block_q) @ variance.mT / 8
    log_n = torch.tensor(float(block_k)).log()
    expected = torch.where(s <= 2 * log_n, s / 2, (2 * s * log_n).sqrt() - log_n)
    torch.testing.assert_close(found, expected)


def test_spread_is_closer_to_the_attention_of_a_block(generator):
    q = torch.randn(1, 2, 128, 16, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, 512, 16, generator=generator, dtype=torch.float64)
    k *= torch.linspace(0.2, 3, 16, dtype=torch.float64).repeat_interleave(32)[:, None]
    blocks = {"block_q": 32, "block_k": 32}
    truth = (q @ k.mT / 4).unflatten(3, (-1, 32)).exp().mean(-1).log()
    truth = truth.unflatten(2, (-1, 32)).mean(3)
    error = {
        spread: float((block_scores(q, k, spread=spread, **blocks) - truth).abs().mean())
        for spread in (False, True)
    }
    assert error[True] < 0.3 * error[False]


def test_blocks_of_equal_keys_have_no_spread(generator):
    q = torch.randn(1, 2, 64, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, 4, 8, generator=generator, dtype=torch.float64).repeat_interleave(16, 2)
    blocks = {"block_q": 16, "block_k": 16}
    torch.testing.assert_close(
        block_scores(q, k, spread=True, **blocks), block_scores(q, k, **blocks)
    )


def test_sizes_reach_the_side_they_belong_to(generator):
    q, k = torch.randn(2, 1, 1, 32, 8, generator=generator, dtype=torch.float64)
    q_sizes, k_sizes = [[16, 5]], [[7, 16]]
    scores = block_scores(
        q,
        k,
        block_q=16,
        block_k=16,
        q_sizes=torch.tensor(q_sizes),
        k_sizes=torch.tensor(k_sizes),
        scale=1.0,
    )
    expected = brute_pool(q, 16, q_sizes) @ brute_pool(k, 16, k_sizes).mT
    torch.testing.assert_close(scores, expected)
    padding = torch.arange(32) % 16 >= torch.tensor(k_sizes)[0].repeat_interleave(16)
    sizes = {"q_sizes": torch.tensor(q_sizes), "k_sizes": torch.tensor(k_sizes)}
    spread = [
        block_scores(q, x, block_q=16, block_k=16, spread=True, **sizes)
        for x in (k, k.masked_fill(padding[:, None], torch.nan))
    ]
    torch.testing.assert_close(*spread)


def test_scores_repeat_bit_for_bit_and_do_not_depend_on_strides(generator):
    q = torch.randn(1, 300, 4, 64, generator=generator).transpose(1, 2)
    k = torch.randn(1, 300, 2, 64, generator=generator).transpose(1, 2)
    first = block_scores(q, k, block_q=64, block_k=32)
    assert torch.equal(first, block_scores(q, k, block_q=64, block_k=32))
    packed = block_scores(q.contiguous(), k.contiguous(), block_q=64, block_k=32)
    torch.testing.assert_close(first, packed)


def test_scores_carry_no_gradient(generator):
    q = torch.randn(1, 1, 64, 8, generator=generator, requires_grad=True)
    assert not block_scores(q, q, block_q=32, block_k=32).requires_grad


def test_heads_that_do_not_divide_are_refused_by_name(unchecked):
    q, k = torch.zeros(1, 3, 64, 8), torch.zeros(1, 2, 64, 8)
    with pytest.raises(ValueError, match=r"^q: 3 .*2 "):
        block_scores(q, k, block_q=16, block_k=16)


def test_smoothing_takes_the_mean_key_away_and_changes_no_choice(generator):
    q = torch.randn(2, 4, 70, 16, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, 90, 16, generator=generator, dtype=torch.float64) + 3
    lengths = torch.tensor([90, 40])
    sizes = (lengths[:, None] - torch.arange(6) * 16).clamp(0, 16)
    blocks = {"block_q": 16, "block_k": 16, "k_sizes": sizes}
    smooth = block_scores(q, k, smooth_k=True, **blocks)
    for b, n in enumerate(lengths):
        centred = k[b, None] - k[b, None, :, :n].mean(2, keepdim=True)
        expected = block_scores(
            q[b, None], centred, smooth_k=False, **{**blocks, "k_sizes": sizes[b, None]}
        )
        valid = sizes[b] > 0
        torch.testing.assert_close(smooth[b, None, ..., valid], expected[..., valid])
    plain = block_scores(q, k, smooth_k=False, **blocks)
    shift = (smooth - plain)[..., :3]
    torch.testing.assert_close(shift, shift[..., :1].expand_as(shift))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_pooling_into_a_dtype_rounds_once(dtype, generator):
    x = torch.randn(1, 2, 70, 8, generator=generator).half()
    assert torch.equal(pool_blocks(x, 16, dtype=dtype), pool_blocks(x, 16).to(dtype))


BAD_POOLS = {
    "block of nothing": ("block", {"block": 0}),
    "too few sizes": ("sizes", {"sizes": torch.ones(1, 2, dtype=torch.int)}),
    "sizes of another batch": ("sizes", {"sizes": torch.ones(3, 4, dtype=torch.int)}),
}


@pytest.mark.parametrize("case", BAD_POOLS)
def test_a_bad_argument_of_pooling_is_named(case, unchecked):
    name, changes = BAD_POOLS[case]
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        pool_blocks(**{"x": torch.zeros(2, 1, 64, 8), "block": 16, **changes})


@pytest.mark.parametrize(
    "options", [{}, {"spread": True, "smooth_k": True}], ids=["mean", "spread"]
)
def test_a_projection_multiplies_the_mean_queries(options, generator):
    q = torch.randn(2, 4, 70, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, 50, 8, generator=generator, dtype=torch.float64)
    w_q = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    w_k = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    blocks = {"block_q": 16, "block_k": 16, "scale": 0.3}
    # One matrix stands for projections of both sides.
    both = w_q @ w_k.repeat_interleave(2, 0).mT
    projected = block_scores(q, k, **blocks, **options, projection=both)
    means_q, means_k = brute_pool(q, 16) @ w_q, brute_pool(k, 16)
    if options.get("smooth_k"):
        means_k = means_k - k.mean(2, keepdim=True)
    expected = 0.3 * means_q @ (means_k @ w_k).repeat_interleave(2, 1).mT
    if options.get("spread"):  # which the projection leaves alone
        plain = block_scores(q, k, **blocks)
        expected = expected + block_scores(q, k, **blocks, spread=True) - plain
    torch.testing.assert_close(projected, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_identity_projects_nothing(dtype, generator):
    q, k = (torch.randn(1, 2, 70, 8, generator=generator).to(dtype) for _ in range(2))
    options = {"block_q": 16, "block_k": 16, "spread": True}
    identity = torch.eye(8).repeat(2, 1, 1)
    expected = block_scores(q, k, **options)
    found = block_scores(q, k, **options, projection=identity)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_projection_of_other_heads_is_refused(generator, unchecked):
    q = torch.randn(1, 4, 20, 8, generator=generator)
    with pytest.raises(ValueError, match=r"projection: .*\(2, 8, 8\).*\[4, 8, 8\]"):
        block_scores(q, q, block_q=16, block_k=16, projection=torch.zeros(2, 8, 8))
