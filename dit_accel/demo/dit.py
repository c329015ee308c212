"""The demo's diffusion transformer: its configuration, its conditioning and one training step."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .clips import Clips
from .config import TrainConfig
from .text import TEXT_DIM, embed
from .vae import LATENT_CHANNELS
from .vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, TEMPLATES, caption, combinations

# Padded caption lengths; a caption of the dataset has at most 11 tokens.
SHORT_TEXT, LONG_TEXT = 16, 512


def build_transformer(config: TrainConfig) -> Any:
    """A WanTransformer3DModel with one token a latent position.

    Its output starts at zero, and its blocks' gates at one rather than at random values of about
    .1, so that the blocks learn from the first steps on.
    """
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=config.num_heads,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=128,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table[:, [2, 5]] = 1.0  # the gates of attention and feed-forward
    return model


class CaptionTable:
    """The embeddings of every caption the dataset can have, computed once."""

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        rows = [
            caption(c, b, t)
            for c in combinations("all")
            for b in range(len(BACKGROUNDS))
            for t in range(len(TEMPLATES))
        ]
        distinct = list(dict.fromkeys(rows))
        position = {text: i for i, text in enumerate(distinct)}
        self._row = torch.tensor([position[text] for text in rows])
        batches = [distinct[i : i + 512] for i in range(0, len(distinct), 512)]
        parts = [embed(encoder, tokenizer, batch, SHORT_TEXT) for batch in batches]
        self._embeddings = torch.cat(parts).to(device)  # [captions, 16, d]
        self._empty = embed(encoder, tokenizer, [""], SHORT_TEXT).to(device)

    def index(self, clips: Clips) -> Tensor:
        """Each clip's row in the table."""
        row = torch.zeros_like(clips.shape)
        for label, count in (
            (clips.shape, len(SHAPES)),
            (clips.colour, len(COLOURS)),
            (clips.motion, len(MOTIONS)),
            (clips.background, len(BACKGROUNDS)),
            (clips.template, len(TEMPLATES)),
        ):
            row = row * count + label
        return self._row[row]

    def lookup(self, index: Tensor, empty: Tensor, length: int) -> Float[Tensor, "b l d"]:
        """The embeddings of these rows, or of the empty caption where `empty`, zero-padded to
        `length`."""
        device = self._embeddings.device
        states = torch.where(
            empty.to(device)[:, None, None], self._empty, self._embeddings[index.to(device)]
        )
        return nn.functional.pad(states, (0, 0, 0, length - SHORT_TEXT))


def flow_matching_loss(
    model: nn.Module,
    latents: Float[Tensor, "n z t h w"],
    caption_rows: Tensor,
    table: CaptionTable,
    config: TrainConfig,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity on a batch drawn from a pool of (normalised) latents."""
    rows = torch.randint(len(latents), (batch_size,), generator=generator)
    noise = torch.randn(batch_size, *latents.shape[1:], generator=generator, dtype=torch.float32)
    level = torch.sigmoid(1.1 * torch.randn(batch_size, generator=generator, dtype=torch.float32))
    empty = (
        torch.rand(batch_size, generator=generator, dtype=torch.float32) < config.caption_dropout
    )
    long_text = (
        torch.rand((), generator=generator, dtype=torch.float32).item() < config.long_text_share
    )

    device = latents.device
    sigma = (config.shift * level / (1 + (config.shift - 1) * level)).to(device)
    noise, clean = noise.to(device), latents[rows.to(device)]
    mix = sigma[:, None, None, None, None]
    text = table.lookup(caption_rows[rows], empty, LONG_TEXT if long_text else SHORT_TEXT)
    with torch.autocast(device.type, torch.bfloat16):
        velocity = model((1 - mix) * clean + mix * noise, sigma * 1000, text, return_dict=False)[0]
    return (velocity.float() - (noise - clean)).square().mean()
