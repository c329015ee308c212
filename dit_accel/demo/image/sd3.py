"""The stills' Stable Diffusion 3: a transformer with one token a latent position, and three random text
encoders that are never trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ImageTrainConfig
from ..text import build_tokenizer
from .model import HEAD_DIM, LATENT_SIDE, Captions, StillModel
from .vae import LATENT_CHANNELS, build_vae

MAX_TOKENS = 24  # of a prompt for the CLIPs; a caption of the data set has at most 10
CLIP_DIM = 32
TEXT_DIM = 2 * CLIP_DIM  # both CLIPs' states side by side; also T5's
# T5's padded lengths (max_sequence_length): short in most steps, and the pipeline's default.
SHORT_TEXT, LONG_TEXT = 16, 256
MAX_SIDE = 32  # latent positions a side, at most


def _position_table(size: int, width: int) -> Float[Tensor, "1 size2 width"]:
    """Sines and cosines of both coordinates, at wavelengths from 4 to 128 tokens.

    The model's own go up to 60,000 tokens: over 16, most of them are constant.
    """
    angles = torch.arange(size)[:, None] * math.pi / torch.logspace(1, 6, width // 4, base=2.0)
    one = torch.cat([angles.sin(), angles.cos()], 1)  # [size, width / 2]
    down, across = one[:, None].expand(-1, size, -1), one[None].expand(size, -1, -1)
    return torch.cat([across, down], -1).reshape(1, size * size, width)


def build_transformer(config: ImageTrainConfig) -> Any:
    """An SD3Transformer2DModel with one token a latent position.

    Its output starts at zero, and what the time and the caption do to a block starts as a gate of
    one, so that the blocks learn from the first steps on.
    """
    from diffusers import SD3Transformer2DModel

    width = HEAD_DIM * config.num_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = SD3Transformer2DModel(
            sample_size=LATENT_SIDE,
            patch_size=1,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=config.num_layers,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=config.num_heads,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=width,
            pooled_projection_dim=TEXT_DIM,
            pos_embed_max_size=MAX_SIDE,
            qk_norm="rms_norm",
        )
    model.pos_embed.pos_embed.copy_(_position_table(MAX_SIDE, width))
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for block in model.transformer_blocks:
        # The first head starts with equal queries and keys, so it attends to what is near and alike.
        block.attn.to_k.weight.data[:HEAD_DIM] = block.attn.to_q.weight.data[:HEAD_DIM]
        block.attn.to_k.bias.data[:HEAD_DIM] = block.attn.to_q.bias.data[:HEAD_DIM]
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
            if len(norm.linear.bias) == 6 * width:
                nn.init.ones_(norm.linear.bias.data[2 * width : 3 * width])  # attention's gate
                nn.init.ones_(norm.linear.bias.data[5 * width :])  # the feed-forward's
    return model


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


class StableDiffusion3Captions(Captions):
    """Text embeddings of `StableDiffusion3Pipeline`, T5's part padded to a short and to a long length."""

    def __init__(
        self, pipeline: Any, captions: list[str], device: torch.device, long_text_share: float
    ) -> None:
        distinct, rows = self.index([*captions, ""])
        self.rows, self._empty = rows[:-1], rows[-1]
        self._long_text_share = long_text_share
        self._states: dict[int, Tensor] = {}
        for length in (SHORT_TEXT, LONG_TEXT):
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
        """Return states and pooled embeddings of these rows, or of the empty caption where `empty`, as with
        `max_sequence_length=length` (`SHORT_TEXT` or `LONG_TEXT`)."""
        rows = torch.where(empty, self._empty, rows).to(self._pooled.device)
        return self._states[length][rows], self._pooled[rows]

    def velocity(
        self,
        model: nn.Module,
        noisy: Float[Tensor, "n z h w"],
        sigma: Float[Tensor, " n"],
        rows: Tensor,
        empty: Tensor,
        generator: torch.Generator,
    ) -> Float[Tensor, "n z h w"]:
        drawn = torch.rand((), generator=generator, dtype=torch.float32).item()
        length = LONG_TEXT if drawn < self._long_text_share else SHORT_TEXT
        states, pooled = self.lookup(rows, empty, length)
        return model(noisy, states, pooled, sigma * 1000, return_dict=False)[0]


STABLE_DIFFUSION_3 = StillModel(
    pipeline="StableDiffusion3Pipeline",
    side=64,
    build_vae=lambda config: build_vae(config.vae_base_dim, config.seed),
    build_transformer=build_transformer,
    build_text_parts=build_text_parts,
    embed=lambda pipeline, captions, device, config: StableDiffusion3Captions(
        pipeline, captions, device, config.long_text_share
    ),
)
