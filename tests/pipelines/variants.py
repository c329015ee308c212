"""Checks that hold for every pipeline of diffusers that calls a transformer of a family."""

import torch

import dit_accel

from ..random_pipelines import relative

SLA = {"block_q": 16, "block_k": 16, "order": (1, 4, 4), "crossover": "never"}
SLA |= {"dense_steps": 0, "dense_layers": 0}
RAS = {"warmup": 2, "tail": 1, "resets": []}


def check_variant(pipe, **arguments):
    """Check that reading and running everything gives the plain result, also in partial steps, and reading less does not."""
    pipe.set_progress_bar_config(disable=True)
    plain = _latents(pipe, arguments)
    settings = {"ratio": 1.0, "kv_predictor": "hold", **RAS}
    dit_accel.enable(pipe, ras=settings, sla={**SLA, "topk": 1.0})
    assert relative(_latents(pipe, arguments), plain) < 1e-5
    report = dit_accel.summary(pipe)
    assert report.overall_density == 1
    assert not report.dense_calls
    dit_accel.disable(pipe)
    dit_accel.enable(pipe, ras={"ratio": 0.4, **RAS}, sla={**SLA, "topk": 0.3})
    result = _latents(pipe, arguments)
    report = dit_accel.summary(pipe, strict=True)
    assert report.ras.ras_steps > 0
    assert report.overall_density < 0.9
    assert 1e-5 < relative(result, plain) < 0.5
    dit_accel.disable(pipe)


def _latents(pipe, arguments):
    generator = torch.Generator().manual_seed(0)
    result = pipe(**arguments, generator=generator, output_type="latent")
    return result.frames if hasattr(result, "frames") else result.images


def picture(height, width, channels=3):
    """Return a picture in [0, 1], `[1, C, H, W]`."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(1, channels, height, width, generator=generator)


def mask(height, width):
    """Return a mask of the right half, `[1, 1, H, W]`."""
    x = torch.zeros(1, 1, height, width)
    x[..., width // 2 :] = 1
    return x
