"""Training recipes of the embedded models, and the sampling arguments that suit them."""

import math
from dataclasses import dataclass, fields
from typing import Any

_SIZE = {"height": 64, "width": 64}
_STEPS = {"num_inference_steps": 20, "guidance_scale": 2.0}
SAMPLING: dict[str, Any] = {**_SIZE, "num_frames": 33, **_STEPS, "num_inference_steps": 12}
"""Arguments of the pipeline call that suit tiny-wan."""
IMAGE_SAMPLING: dict[str, Any] = {**_SIZE, **_STEPS, "max_sequence_length": 256}
"""Arguments of the pipeline call that suit tiny-sd3."""


def default_sampling(pipe: Any) -> dict[str, Any]:
    """Return the arguments of the pipeline call that suit an embedded model or one like it.

    Args:
        pipe: pipeline, or its outline (`dit_accel.sampling.outline`). Images have the default size of the
            pipeline.
    """
    if hasattr(pipe, "vae_scale_factor_temporal"):
        return dict(SAMPLING)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return IMAGE_SAMPLING | {"height": side, "width": side}


@dataclass(frozen=True)
class Recipe:
    """Settings that all training recipes share, with checked values."""

    seed: int = 0
    """Decides the data, the initial weights and all noise."""
    vae_steps: int = 1200
    """Training steps of the VAE."""
    vae_batch_size: int = 4
    """Clips (5 frames; 9 for the decoder) or stills per step. More steps help more than larger batches."""
    vae_learning_rate: float = 4e-3
    """Learning rate of Muon and of AdamW."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads of 64 channels (clips) or 32 channels (stills)."""
    ema: float = 0.998
    """Decay of the averaged weights, which are exported."""
    shift: float = 3.0
    """Flow shift of the noise levels in training, and of the exported scheduler."""
    caption_dropout: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    save_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, valid = getattr(self, field.name), f"a positive {field.type}"
            fits = 0 < value < math.inf and (field.type != "int" or isinstance(value, int))
            if field.name in ("ema", "caption_dropout", "long_text_share"):
                fits, valid = 0 <= value <= 1, "in [0, 1]"
            elif field.name == "seed":
                fits, valid = isinstance(value, int) and 0 <= value < 2**63, "an int in [0, 2**63)"
            if not fits:
                raise ValueError(f"{field.name}={value!r}: must be {valid}")


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """Recipe of the Wan model. `assets/tiny-wan` was trained with the defaults."""

    vae_steps: int = 1600
    vae_base_dim: int = 32
    """Channels of the VAE; 32 is 0.7 M parameters."""
    decoder_steps: int = 500
    """Steps that train the decoder alone on noisy latents of the frozen encoder."""
    decoder_learning_rate: float = 2e-3
    """Learning rate of Muon and of AdamW."""
    num_layers: int = 5
    num_heads: int = 2
    ffn_dim: int = 512
    """Channels of the feed-forward layers."""
    short_steps: int = 2400
    """Transformer steps on clips of 9 frames, which are cheap and teach the meaning of words."""
    short_batch_size: int = 8
    short_pool: int = 4096
    """Clips that are encoded once; batches are drawn from their latents."""
    short_learning_rate: float = 2e-3
    """Learning rate of AdamW (embeddings, norms, biases). Muon (matrices) has three times as much."""
    full_steps: int = 1000
    """Transformer steps on clips of 33 frames."""
    full_batch_size: int = 4
    full_pool: int = 2048
    full_learning_rate: float = 1.2e-3
    long_text_share: float = 0.25
    """Share of steps with captions padded to 512 tokens (default of WanPipeline) instead of 16."""


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """Settings that the recipes of the image models share."""

    dit_steps: int = 3000
    """Training steps of the transformer."""
    dit_batch_size: int = 8
    dit_pool: int = 8192
    """Stills that are encoded once; batches are drawn from their latents."""
    dit_learning_rate: float = 2e-3
    """Learning rate of AdamW (embeddings, norms, biases). Muon (matrices) has three times as much."""


@dataclass(frozen=True)
class ImageTrainConfig(ImageRecipe):
    """Recipe of the Stable Diffusion 3 model. `assets/tiny-sd3` was trained with the defaults."""

    vae_base_dim: int = 16
    """Channels of the VAE at full resolution; 16 is 0.6 M parameters."""
    long_text_share: float = 0.15
    """Share of steps with max_sequence_length 256 (default of the pipeline) instead of 16."""


@dataclass(frozen=True)
class Lumina2TrainConfig(ImageRecipe):
    """Recipe of the Lumina-Image 2.0 model. `assets/tiny-lumina2` was trained with the defaults."""

    vae_steps: int = 500
    """Training steps of the VAE, which starts as the VAE of tiny-sd3 with one more level."""
    vae_learning_rate: float = 2e-3
    dit_steps: int = 6000
    num_kv_heads: int = 2
    """Heads of keys and values; must divide `num_heads`."""
    num_refiner_layers: int = 1
    """Blocks over the text alone, and as many over the image alone, before the joint blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}"
            )
