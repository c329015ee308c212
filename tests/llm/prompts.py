"""Random prompts, plans checked against their definitions, and synthetic attention with a planted structure."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.llm.prefill import Pattern, Prompt


@st.composite
def prompts(draw, longest: int = 200, dtype: torch.dtype = torch.float64) -> Prompt:
    """Grouped heads, chunks of a longer prompt, ragged lengths, blocks of 16 or 32; some keys stand out."""
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    kv_len = draw(st.integers(2, longest), label="kv_len")
    q_len = draw(st.integers(2, kv_len) | st.just(kv_len), label="q_len")
    block, tail = draw(st.sampled_from([16, 32])), draw(st.sampled_from([0, 1, 16, 40]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))
    q = torch.randn(batch, kv_heads * group, q_len, 8, generator=g, dtype=dtype) * 2
    k = torch.randn(batch, kv_heads, kv_len, 8, generator=g, dtype=dtype)
    return Prompt(q, k, scale=8**-0.5, block=block, tail=tail)


def row_of(prompt: Prompt, b: int) -> Prompt:
    """Return the prompt of one row of the batch."""
    parts = {"scale": prompt.scale, "block": prompt.block, "tail": prompt.tail}
    spans = prompt.spans and prompt.spans[b : b + 1]
    return Prompt(prompt.q[b : b + 1], prompt.k[b : b + 1], spans=spans, **parts)


def causal(prompt: Prompt) -> Tensor:
    """Return the pairs that a dense call reads, `[Lq, Lk]`."""
    return torch.ones(prompt.q_len, prompt.kv_len, dtype=torch.bool).tril(prompt.offset)


def attention(prompt: Prompt) -> Tensor:
    """Return the exact softmax weights, `[B, Hq, Lq, Lk]`, one head and one row at a time."""
    batch, heads = prompt.q.shape[:2]
    out = prompt.q.new_zeros(batch, heads, prompt.q_len, prompt.kv_len)
    group = heads // prompt.k.shape[1]
    for b in range(batch):
        for h in range(heads):
            for i in range(prompt.q_len):
                seen = prompt.k[b, h // group, : i + prompt.offset + 1]
                out[b, h, i, : len(seen)] = (seen @ prompt.q[b, h, i] * prompt.scale).softmax(0)
    return out


def always(prompt: Prompt) -> Tensor:
    """Return the pairs that every pattern reads, `[Lq, Lk]`: block 0, the query's own block and the one before."""
    at = torch.arange(prompt.q_len)[:, None] + prompt.offset
    key = torch.arange(prompt.kv_len)
    near = at // prompt.block - key // prompt.block <= 1
    return ((key < prompt.block) | near | last_rows(prompt)[:, None]) & causal(prompt)


def last_rows(prompt: Prompt) -> Tensor:
    """Return the last `tail` queries, `[Lq]`."""
    return torch.arange(prompt.q_len) >= prompt.q_len - prompt.tail


def read_blocks(prompt: Prompt, mask: Tensor) -> Tensor:
    """Return the pairs of blocks, `[..., Lq, Lk]`, without those that are not causal."""
    mask = mask.repeat_interleave(prompt.block, -1).repeat_interleave(prompt.block, -2)
    return mask[..., : prompt.q_len, : prompt.kv_len] & causal(prompt)


def check_plan(pattern: Pattern, prompt: Prompt) -> tuple[SparsePlan, Tensor]:
    """Check what holds for every plan; return it with its mask `[B, Hq, Lq, Lk]`."""
    heads = prompt.q.shape[1]
    plan = pattern.plan(prompt)
    mask = plan.for_heads(heads).to_dense_mask().expand(len(prompt.q), heads, -1, -1)
    assert mask.shape[2:] == (prompt.q_len, prompt.kv_len)
    assert not (mask & ~causal(prompt)).any()
    assert (mask | ~always(prompt)).all()
    if prompt.tail:
        assert torch.equal(
            mask[..., -prompt.tail :, :],
            causal(prompt)[-prompt.tail :].expand_as(mask[..., -prompt.tail :, :]),
        )
    _check_output(prompt, plan, mask)
    for b in range(len(prompt.q)):
        alone = pattern.plan(row_of(prompt, b)).for_heads(heads).to_dense_mask()
        assert torch.equal(mask[b : b + 1], alone.expand(1, heads, -1, -1))
    return plan, mask


def _check_output(prompt: Prompt, plan: SparsePlan, mask: Tensor) -> None:
    v = torch.randn(prompt.k.shape, dtype=prompt.k.dtype)
    out = block_sparse_attention(prompt.q, prompt.k, v, plan, scale=prompt.scale)
    group = prompt.q.shape[1] // prompt.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (prompt.k, v))
    scores = (prompt.q @ k.mT * prompt.scale).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-8, atol=1e-9)
