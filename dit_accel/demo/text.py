"""The tokenizer (built in code) and the text encoder (a random UMT5 that is never trained)."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

TEXT_DIM = 64
# Words that no training caption has, so that other prompts and negative prompts tokenize to
# something.
_OTHER_WORDS = [
    "and",
    "the",
    "of",
    "in",
    "with",
    "video",
    "clip",
    "photo",
    "cat",
    "dog",
    "star",
    "ring",
    "ball",
    "box",
    "pink",
    "dark",
    "bright",
    "plain",
    "still",
    "static",
    "spinning",
    "slowly",
    "quickly",
    "fast",
    "slow",
    "small",
    "large",
    "big",
    "low",
    "high",
    "quality",
    "blurry",
    "moving",
    "circling",
    "to",
    "from",
]


def build_tokenizer(further_words: Iterable[str] = ()) -> Any:
    """A unigram tokenizer over the captions' words, spelling out any other word.

    Args:
        further_words: words, in lower case, that get a token of their own too.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    motion_words = [word for motion in MOTIONS for word in motion.split()]
    words = [
        "a",
        "an",
        "is",
        "on",
        "background",
        *SHAPES,
        *COLOURS,
        *motion_words,
        *BACKGROUNDS,
        *_OTHER_WORDS,
        *further_words,
    ]
    letters = string.ascii_lowercase + string.digits + ",.!?-'"
    # Scores are log-probabilities: a whole word beats its letters, a letter beats the unknown
    # token.
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0)]
    vocabulary += [("▁" + word, -3.0) for word in dict.fromkeys(words)]
    vocabulary += [(letter, -8.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def build_text_encoder(vocabulary_size: int, seed: int = 0) -> Any:
    """A one-layer UMT5 with random weights.

    No attribute shares a word with another, so the words' (random) embeddings are all the DiT
    needs; one layer keeps them close to what they are in other sentences, which is what makes
    unseen combinations work.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(config).eval().requires_grad_(False)


@torch.no_grad()
def embed(
    encoder: Any, tokenizer: Any, captions: list[str], length: int = 16
) -> Float[Tensor, "n l d"]:
    """What WanPipeline feeds its transformer: the encoder's output, zero after the caption's last
    token."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]
