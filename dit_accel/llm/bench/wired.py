"""`wired_model`: a Llama with handwritten weights that looks up keys, to test retrieval without training a model.

The model has two attention layers and no feed-forward network. Each token has a code, a random unit vector. The hidden
states have four zones of `CODE` channels: the code of the token, the code to look for, the code of the previous token, and
the answer.

- Layer 0 copies the code of the previous token into the third zone. Its heads use the fast RoPE planes, whose dot product
  peaks at distance 1.
- Layer 1 finds the position whose previous token has the code to look for, and copies the code of the token at that
  position into the answer zone. Its heads use the slow RoPE planes, which hardly depend on the position.
- The output head compares the answer with all codes.

The model therefore repeats the token that followed an earlier occurrence: after "a b ... a" it predicts "b". A reference
token looks for the code of its key instead of its own code, so the model can follow chains of assignments.
"""

import math
from typing import Any

import torch
from torch import Tensor

KEYS = 256
"""Tokens 0 to 255 are keys, or names of variables."""
REFERENCES = 256
"""Tokens 256 to 511 are references: token 256 + i refers to key i."""
VALUES = 128
"""Tokens 512 to 639 are values and noise."""
FIRST_VALUE = KEYS + REFERENCES
START = FIRST_VALUE + VALUES
"""First token of a prompt."""
VOCABULARY = START + 1

CODE = 30
HEAD = 64
HEADS, KV_HEADS = 4, 2
"""All heads have the same weights and their outputs are averaged, so that no head of a pattern is idle."""
HIDDEN = 128
THETA = 1e9
"""Base of RoPE. The planes of layer 1 rotate by less than half a radian over 32,768 tokens."""
FAST = torch.arange(12)
"""Fast RoPE planes, which distinguish distance 1 from other distances."""
SLOW = torch.arange(17, 32)
"""Slow RoPE planes. 15 planes of two channels hold a code."""
SHARPNESS = 40.0
"""Score of the previous token in layer 0, per plane."""
MATCH = 70.0
"""Score of a matching code in layer 1."""


def wired_model(max_length: int = 32_768, seed: int = 0) -> Any:
    """Return the handwritten model in fp32.

    Args:
        max_length: maximum number of positions, at most 32,768.
        seed: random seed of the codes.

    Raises:
        ValueError: `max_length` is out of range.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if not 1 <= max_length <= 32_768:
        raise ValueError(f"max_length={max_length}: must be an int in [1, 32768]")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=START,
        eos_token_id=None,
        pad_token_id=START,
    )
    model = LlamaForCausalLM(config).float().eval()
    codes = torch.randn(VOCABULARY, CODE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        _write(model, codes / codes.norm(dim=1, keepdim=True))
    return model


def _write(model: Any, codes: Tensor) -> None:
    own, wanted, before, answer = (slice(i * CODE, (i + 1) * CODE) for i in range(4))
    constant = 4 * CODE
    """Channel that is 1 for every token."""
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)

    embedding = model.model.embed_tokens.weight
    embedding[:, own] = embedding[:, wanted] = codes
    embedding[KEYS:FIRST_VALUE, wanted] = codes[:KEYS]
    embedding[:, constant] = 1.0

    # Before layer 0, layer 1 and the output head, hidden states consist of 3, 4 and 5 parts of norm 1. RMSNorm divides by
    # the root mean square; these factors undo it.
    before_first, before_second, before_head = (math.sqrt(n / HIDDEN) for n in (3, 4, 5))
    angle = THETA ** (-FAST / (HEAD // 2))
    query, key = torch.zeros(HEAD, HIDDEN), torch.zeros(HEAD, HIDDEN)
    key[FAST, constant] = 1.0
    # Rotate back by one position, so that the score is the sum of cos((distance - 1) * angle).
    query[FAST, constant] = torch.cos(angle) * SHARPNESS
    query[FAST + HEAD // 2, constant] = -torch.sin(angle) * SHARPNESS
    _write_heads(model.model.layers[0].self_attn, query, key, own, before, before_first)

    channels = torch.cat([SLOW, SLOW + HEAD // 2])
    query, key = torch.zeros(HEAD, HIDDEN), torch.zeros(HEAD, HIDDEN)
    query[channels, wanted] = torch.eye(CODE) * MATCH
    key[channels, before] = torch.eye(CODE)
    _write_heads(model.model.layers[1].self_attn, query, key, own, answer, before_second)

    model.lm_head.weight[:, answer] = codes * 30 * before_head


def _write_heads(
    attention: Any, query: Tensor, key: Tensor, source: slice, target: slice, norm: float
) -> None:
    """Set the weights of all heads of a layer: score with `query` and `key` `[HEAD, HIDDEN]`, copy zone `source` to `target`."""
    value = torch.zeros(HEAD, HIDDEN)
    value[:CODE, source] = torch.eye(CODE)
    unscale = math.sqrt(HEAD)  # attention divides scores by it
    attention.q_proj.weight.copy_((query * unscale * norm).repeat(HEADS, 1))
    attention.k_proj.weight.copy_((key * norm).repeat(KV_HEADS, 1))
    attention.v_proj.weight.copy_((value * norm).repeat(KV_HEADS, 1))
    for head in range(HEADS):
        attention.o_proj.weight[target, head * HEAD : head * HEAD + CODE] = torch.eye(CODE) / HEADS
