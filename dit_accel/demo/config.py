"""The training recipe: every number that decides what `train` produces."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

NUM_FRAMES, HEIGHT, WIDTH = 33, 64, 64  # 17 x 8 x 8 = 1,088 latent tokens
# Arguments of the pipeline call that suit the embedded models: tiny-wan, and tiny-sd3. See `default_sampling`.
SAMPLING = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": NUM_FRAMES,
    "num_inference_steps": 12,
    "guidance_scale": 2.0,
}
IMAGE_SAMPLING = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
    "max_sequence_length": 256,
}
VAE_FRAMES, DECODER_FRAMES, STATISTICS_FRAMES = 5, 9, 17
SHORT_FRAMES = 9  # 5 x 8 x 8 = 320 tokens, for the first DiT stage


def default_sampling(pipe: Any) -> dict[str, Any]:
    """Return the arguments of the pipeline call that suit an embedded model or one like it.

    Args:
        pipe: pipeline, or its outline (`dit_accel.sampling.outline`). Images have the size that it makes by
            default.
    """
    if hasattr(pipe, "vae_scale_factor_temporal"):
        return dict(SAMPLING)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return IMAGE_SAMPLING | {"height": side, "width": side}


@dataclass(frozen=True)
class Recipe:
    """What the recipes share: checked fields, and themselves as JSON."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("ema", "caption_dropout", "long_text_share"):
                if not 0 <= value <= 1:
                    raise ValueError(f"{field.name} must lie in [0, 1], got {value!r}")
            elif field.name == "seed":
                if not isinstance(value, int) or not 0 <= value < 2**63:
                    raise ValueError(f"seed must be an integer in [0, 2**63), got {value!r}")
            elif not 0 < value < math.inf or (field.type == "int" and not isinstance(value, int)):
                raise ValueError(f"{field.name} must be a positive {field.type}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """How to train the demo model. The defaults are what `assets/tiny-wan` was trained with."""

    seed: int = 0
    """Decides the data, the initial weights and all noise."""
    vae_steps: int = 1600
    vae_batch_size: int = 4
    """Clips a step, of 5 frames each, and of 9 in the decoder stage: more steps beat larger ones."""
    vae_learning_rate: float = 4e-3
    """Learning rate of Muon and AdamW alike."""
    vae_base_dim: int = 32
    """Channels of the VAE; 32 is .7 M parameters."""
    decoder_steps: int = 500
    """Steps that tune the decoder alone on noisy latents, the encoder (and so the latents) staying
    as it is."""
    decoder_learning_rate: float = 2e-3
    num_layers: int = 5
    num_heads: int = 2
    """Of 64 channels each."""
    ffn_dim: int = 512
    short_steps: int = 2400
    """DiT steps on clips of 9 frames, which are cheap and enough to learn what the words mean."""
    short_batch_size: int = 8
    short_pool: int = 4096
    """Clips whose latents are computed once and drawn from; also `full_pool`."""
    short_learning_rate: float = 2e-3
    """Of AdamW, for embeddings, norms and biases; Muon, for the blocks' matrices, has three times that."""
    full_steps: int = 1000
    """DiT steps on clips of the full 33 frames."""
    full_batch_size: int = 4
    full_pool: int = 2048
    full_learning_rate: float = 1.2e-3
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones kept."""
    shift: float = 3.0
    """Flow shift of the noise levels in training, and of the exported scheduler."""
    caption_dropout: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    long_text_share: float = 0.25
    """Share of steps with captions padded to 512 tokens (WanPipeline's default) rather than 16."""
    save_every: int = 200
    """Steps between checkpoints."""


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """Settings that the recipes of the image models share."""

    seed: int = 0
    """Decides the data, the initial weights and all noise."""
    vae_steps: int = 1200
    vae_batch_size: int = 4
    vae_learning_rate: float = 4e-3
    """Learning rate of Muon and AdamW alike."""
    num_layers: int = 4
    num_heads: int = 4
    """Of 32 channels each."""
    dit_steps: int = 3000
    dit_batch_size: int = 8
    dit_pool: int = 8192
    """Stills whose latents are computed once and drawn from."""
    dit_learning_rate: float = 2e-3
    """Of AdamW, for embeddings, norms and biases; Muon, for the blocks' matrices, has three times that."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones kept."""
    shift: float = 3.0
    """Flow shift of the noise levels in training, and of the exported scheduler."""
    caption_dropout: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    save_every: int = 200
    """Steps between checkpoints."""


@dataclass(frozen=True)
class ImageTrainConfig(ImageRecipe):
    """Recipe of the Stable Diffusion 3 model. The defaults are what `assets/tiny-sd3` was trained with."""

    vae_base_dim: int = 16
    """Channels of the VAE at full resolution; 16 is .6 M parameters."""
    long_text_share: float = 0.15
    """Share of steps with max_sequence_length 256 (the pipeline's default) rather than 16."""


@dataclass(frozen=True)
class Lumina2TrainConfig(ImageRecipe):
    """Recipe of the Lumina-Image 2.0 model. The defaults are what `assets/tiny-lumina2` was trained with."""

    vae_steps: int = 500
    """Steps from the VAE of tiny-sd3 with a level at full resolution added to it."""
    vae_learning_rate: float = 2e-3
    """Learning rate of Muon and AdamW alike."""
    dit_steps: int = 6000
    num_kv_heads: int = 2
    """Heads of keys and values, each shared by `num_heads / num_kv_heads` heads of queries."""
    num_refiner_layers: int = 1
    """Layers over the text alone, and as many over the image alone, before the joint ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}"
            )
