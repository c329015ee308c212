"""The stills' Lumina-Image 2.0: a transformer with one token a latent position, and a random Gemma 2 that is
never trained."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dit_accel.files import asset

from ..config import Lumina2TrainConfig
from ..text import TEXT_DIM, build_tokenizer
from .model import HEAD_DIM, LATENT_SIDE, Captions, StillModel
from .vae import LATENT_CHANNELS, double_vae

SYSTEM_PROMPT = (
    "you are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <prompt start>"
)
"""Text that the pipeline puts before each prompt, but not before the negative one. Each word gets a token of its own:
spelled out they would be several times as many tokens as the caption."""
SHORT_TEXT = 40
"""Padded length of the text in training (max_sequence_length); the longest prompt of the data set has 34
tokens. The transformer masks padding, so its output does not depend on this length."""
AXES = (
    8,
    12,
    12,
)  # channels of a head that encode the position in the text, the row and the column


def build_text_parts(seed: int = 0) -> dict[str, Any]:
    """The pipeline's tokenizer and text encoder, by their names in the pipeline."""
    tokenizer = build_tokenizer(SYSTEM_PROMPT.split())
    return {"tokenizer": tokenizer, "text_encoder": build_gemma2(len(tokenizer), seed)}


def build_gemma2(vocabulary_size: int, seed: int) -> Any:
    """A one-layer Gemma 2 with random weights.

    The pipeline takes the states before the last layer, here the words' embeddings: the same in all
    sentences, which is what makes unseen combinations work.
    """
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=512,
        sliding_window=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma2Model(config).eval().requires_grad_(False)


def build_transformer(config: Lumina2TrainConfig) -> Any:
    """A Lumina2Transformer2DModel with one token a latent position.

    Its output starts at zero, and what the time does to a block starts as a gate of .5, so that the
    blocks learn from the first steps on.
    """
    from diffusers import Lumina2Transformer2DModel

    width = HEAD_DIM * config.num_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = Lumina2Transformer2DModel(
            sample_size=LATENT_SIDE,
            patch_size=1,
            in_channels=LATENT_CHANNELS,
            hidden_size=width,
            num_layers=config.num_layers,
            num_refiner_layers=config.num_refiner_layers,
            num_attention_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            multiple_of=32,
            axes_dim_rope=AXES,
            axes_lens=(600, 64, 64),
            cap_feat_dim=TEXT_DIM,
        )
        _spread_times(model.time_caption_embed.timestep_embedder.linear_1)
    nn.init.zeros_(model.norm_out.linear_1.weight)
    nn.init.zeros_(model.norm_out.linear_1.bias)
    nn.init.zeros_(model.norm_out.linear_2.weight)
    nn.init.zeros_(model.norm_out.linear_2.bias)
    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        # The first head starts with equal queries and keys, so it attends to what is near and alike.
        block.attn.to_k.weight.data[:HEAD_DIM] = block.attn.to_q.weight.data[:HEAD_DIM]
        if block.modulation:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
            gates = block.norm1.linear.bias.data.view(4, width)[1::2]  # attention's, feed-forward's
            nn.init.constant_(gates, 0.55)  # its hyperbolic tangent is .5
    return model


@torch.no_grad()
def _spread_times(linear: nn.Linear) -> None:
    """Let the units of the timestep's first layer switch on at times that are spread over [0, 1].

    The pipeline passes times in [0, 1] to an embedding made for [0, 1000]: all its channels are nearly constant
    or linear there, so a layer with the usual weights would hardly tell one time from another.
    """
    sine = (
        linear.in_features // 2
    )  # the cosines come first; this channel is the sine of the time itself
    slope = 8 * torch.randn(linear.out_features)
    linear.weight[:, sine] += slope
    linear.bias.copy_(-slope * torch.rand(linear.out_features).sin())


def build_vae(seed: int = 0) -> Any:
    """The VAE of tiny-sd3 with twice the stride: the pipeline assumes 8 x 8 pixels a latent position."""
    from diffusers import AutoencoderKL

    return double_vae(AutoencoderKL.from_pretrained(asset("tiny-sd3") / "vae"), seed)


class Lumina2Captions(Captions):
    """Text embeddings of `Lumina2Pipeline` with its default system prompt."""

    def __init__(self, pipeline: Any, captions: list[str], device: torch.device) -> None:
        distinct, self.rows = self.index(captions)
        states, mask, empty_states, empty_mask = pipeline.encode_prompt(
            distinct, negative_prompt="", device=device, max_sequence_length=SHORT_TEXT
        )
        # All rows of the negative prompt are the same: one of them goes to the end of the table.
        self._states = torch.cat([states, empty_states[:1]])
        self._mask = torch.cat([mask, empty_mask[:1]])

    def lookup(
        self, rows: Tensor, empty: Tensor
    ) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        """Return states and masks of these rows, or of the empty negative prompt where `empty`."""
        rows = torch.where(empty, len(self._states) - 1, rows).to(self._states.device)
        return self._states[rows], self._mask[rows].bool()

    def velocity(
        self,
        model: nn.Module,
        noisy: Float[Tensor, "n z h w"],
        sigma: Float[Tensor, " n"],
        rows: Tensor,
        empty: Tensor,
        generator: torch.Generator,
    ) -> Float[Tensor, "n z h w"]:
        states, mask = self.lookup(rows, empty)
        # Time runs from noise at 0 to the image at 1, and the output points to the image.
        return -model(noisy, 1 - sigma, states, mask, return_dict=False)[0]


LUMINA_IMAGE_2 = StillModel(
    pipeline="Lumina2Pipeline",
    side=128,
    build_vae=lambda config: build_vae(config.seed),
    build_transformer=build_transformer,
    build_text_parts=build_text_parts,
    embed=lambda pipeline, captions, device, _: Lumina2Captions(pipeline, captions, device),
)
