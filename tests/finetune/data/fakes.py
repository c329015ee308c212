"""A model that encodes by averaging pixels and by counting letters."""

from types import SimpleNamespace

import torch
from torch import nn


class FakeVae(nn.Module):
    """Module with a configuration, as VAEs of diffusers are."""

    def __init__(self, seed=0, **config):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(40, 7, generator=torch.Generator().manual_seed(seed))
        )
        self.config = {"latents_mean": [0.0], **config}


class FakeModel:
    """Trainable for tests: sides of latents are 1/8, frames (f - 1) / 4 + 1."""

    def __init__(self, seed=0, images=False, **config):
        parts = {"vae": FakeVae(seed, **config), "text_encoder": FakeVae(seed + 1)}
        self.pipe = SimpleNamespace(components=parts, transformer=None, config={}, **parts)
        self.frames_rule = (0, 1) if images else (4, 1)
        self.size_multiple = 16
        self.calls = []
        self.prompts = []

    def latent_shape(self, height, width, num_frames):
        frames = () if self.frames_rule[0] == 0 else ((num_frames - 1) // 4 + 1,)
        return (3, *frames, height // 8, width // 8)

    def encode_pixels(self, pixels):
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1
        self.calls.append(tuple(pixels.shape))
        step = self.frames_rule[0]
        kept = pixels[:, :, ::step] if step else pixels[:, :, :1]
        pooled = nn.functional.avg_pool3d(kept, (1, 8, 8))
        return pooled if step else pooled[:, :, 0]

    def encode_prompts(self, prompts):
        self.prompts += prompts
        rows = [[float(len(x)), float(x.count("a")), float(sum(x.encode()) % 97)] for x in prompts]
        text = torch.tensor(rows)[:, None].expand(-1, 2, -1)
        mask = torch.ones(len(prompts), 2, dtype=torch.long)
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}
