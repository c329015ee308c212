"""Tiny pipelines of the families that can be fine-tuned, and conditions of their transformers."""

import torch

from dit_accel.finetune.families import trainable_of

from ...random_pipelines import embeddings, make

FAMILIES = ("wan", "sd3", "sd35", "lumina", "lumina2")
MASKS = {"lumina": "encoder_mask", "lumina2": "encoder_attention_mask"}
TEXT_TOKENS = 12


def pipeline(family, solver="euler"):
    return make(family, solver)


def trainable(family):
    return trainable_of(pipeline(family), max_sequence_length=TEXT_TOKENS)


def conditions(family, prompts):
    """Conditions of numbered prompts, as `embeddings` makes them for the pipeline."""
    given = embeddings(family, prompts)
    found = {"encoder_hidden_states": given["prompt_embeds"]}
    if family.startswith("sd3"):
        found["pooled_projections"] = given["pooled_prompt_embeds"]
    if family in MASKS:
        found[MASKS[family]] = given["prompt_attention_mask"]
    return found


def latents(trainable, rows=2, seed=5):
    """Random latents of 9 frames of 96 x 96 pixels, or of an image of 128 x 128."""
    size = (96, 96, 9) if trainable.name == "wan" else (128, 128, 1)
    shape = trainable.latent_shape(*size)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def with_text_encoder(family):
    """A pipeline that encodes prompts itself."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    from dit_accel.files import asset
    from dit_accel.sampling.load import load_pipeline

    if family in ("wan", "sd3"):
        pipe = load_pipeline(asset(f"tiny-{family}"), sla=None, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        return pipe
    pipe = pipeline(family)
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-wan") / "tokenizer")
    torch.manual_seed(0)
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
        )
    ).eval()
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    return pipe
