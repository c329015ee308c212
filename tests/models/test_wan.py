"""The Wan attention processor against diffusers' own."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
)

from dit_accel.models import wan


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return WanAttention(dim=32, heads=2, dim_head=16, processor=WanAttnProcessor()).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    rope = WanRotaryPosEmbed(16, (1, 1, 1), 16)
    return torch.randn(2, 24, 32, generator=generator), rope(torch.zeros(1, 4, 2, 3, 4))


@torch.no_grad()
def test_a_seam_that_declines_gives_the_stock_result(attention, inputs):
    hidden_states, rotary = inputs
    stock = attention(hidden_states, rotary_emb=rotary)
    processor = wan.WanSparseAttnProcessor(attention.processor)
    processor.attend = lambda *a, **k: None
    attention.set_processor(processor)
    torch.testing.assert_close(attention(hidden_states, rotary_emb=rotary), stock, rtol=0, atol=0)


@torch.no_grad()
def test_the_seam_gets_rotated_heads_in_b_h_l_d(attention, inputs):
    hidden_states, rotary = inputs
    stock = attention(hidden_states, rotary_emb=rotary)

    def attend(q, k, v, *, text, text_lengths, padding, masked, scale):
        assert not masked
        assert text_lengths is padding is None
        assert q.shape == k.shape == v.shape == (2, 2, 24, 16)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    processor = wan.WanSparseAttnProcessor(attention.processor)
    processor.attend = attend
    attention.set_processor(processor)
    torch.testing.assert_close(attention(hidden_states, rotary_emb=rotary), stock)
