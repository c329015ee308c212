"""Tiny language models with random weights, built from their configs."""

import torch
import transformers

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_HEADS = {"head_dim": 16}
SLIDING = {**SMALL_HEADS, "sliding_window": 32, "query_pre_attn_scalar": 16}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": SMALL_HEADS,
    "Mistral": {"sliding_window": 48},
    "Phi3": {"sliding_window": 48},
    "Gemma2": {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "Gemma3": {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "Qwen2 with windows": {
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
    },
    # Gives its attention function no window.
    "Qwen2Moe": {
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 3,
    },
    "Glm4": SMALL_HEADS,
    "SmolLM3": {},
}
SPARSE_LAYERS = {"Gemma2": 0}
"""Layers that sparse prefill may change, where that is not all of them."""


def make(name: str, **changes):
    """Return a model of this family, and have it compute attention exactly."""
    family = name.split()[0]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**{**BASE, **MODELS[name], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    # sdpa knows no soft cap.
    model.set_attn_implementation("eager" if name == "Gemma2" else "sdpa")
    return model


def prompt(rows: int = 2, length: int = 150, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, BASE["vocab_size"], (rows, length), generator=generator)
