"""The stills' text encoders: two random CLIPs and a random T5 that are never trained, and what they make
of captions."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..text import build_tokenizer

MAX_TOKENS = 24  # of a prompt for the CLIPs; a caption of the data set has at most 10
CLIP_DIM = 32
TEXT_DIM = 2 * CLIP_DIM  # both CLIPs' states side by side; also T5's


def build_text_parts(seed: int = 0) -> dict[str, Any]:
    """The pipeline's tokenizers and text encoders, by their names in the pipeline."""
    short, long = build_tokenizer(), build_tokenizer()
    short.model_max_length = MAX_TOKENS
    return {
        "tokenizer": short,
        "tokenizer_2": short,
        "tokenizer_3": long,
        "text_encoder": build_clip(len(short), 3 * seed),
        "text_encoder_2": build_clip(len(short), 3 * seed + 1),
        "text_encoder_3": build_t5(len(long), 3 * seed + 2),
    }


def build_clip(vocabulary_size: int, seed: int) -> Any:
    """A one-layer CLIP with random weights.

    The pipeline takes the states before the last layer, here the words' embeddings: the same in all
    sentences, which is what makes unseen combinations work.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=CLIP_DIM,
        intermediate_size=2 * CLIP_DIM,
        projection_dim=CLIP_DIM,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        encoder = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
        # CLIP's own .02 is far below what the transformer's first layer expects.
        for name, parameter in encoder.named_parameters():
            if name.endswith("token_embedding.weight"):
                nn.init.normal_(parameter)
            elif name.endswith("position_embedding.weight"):
                nn.init.normal_(parameter, std=0.1)
            elif name.endswith("out_proj.weight"):
                parameter *= 8  # else the words would hardly show in the pooled embedding
    return encoder


def build_t5(vocabulary_size: int, seed: int) -> Any:
    """A one-layer T5 with random weights."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
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
        return T5EncoderModel(config).eval().requires_grad_(False)


class StillCaptions:
    """What the pipeline makes of some captions and of the empty one, computed once."""

    def __init__(
        self, pipeline: Any, captions: list[str], lengths: tuple[int, ...], device: torch.device
    ) -> None:
        distinct = list(dict.fromkeys([*captions, ""]))
        position = {text: i for i, text in enumerate(distinct)}
        self.rows = torch.tensor([position[text] for text in captions])  # each caption's
        self._empty = position[""]
        self._states: dict[int, Tensor] = {}
        for length in lengths:
            self._states[length], _, self._pooled, _ = pipeline.encode_prompt(
                distinct,
                None,
                None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )

    def lookup(
        self, rows: Tensor, empty: Tensor, length: int
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b p"]]:
        """States and pooled embeddings of these rows, or of the empty caption where `empty`, as with
        `max_sequence_length=length` (one of `lengths`)."""
        rows = torch.where(empty, self._empty, rows).to(self._pooled.device)
        return self._states[length][rows], self._pooled[rows]
