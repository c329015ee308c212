"""`dense_pass`: run the dense model on noisy samples and pass the attention inputs of each layer to a function."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.finetune.batch import Batch
from dit_accel.sla import SparseAttention, SparseLinearAttention
from dit_accel.sla.text import split_text, valid_keys

Visit = Callable[..., None]
"""Function `visit(name, module, q, k, v, text=..., text_tokens=..., scale=...)`. Padded texts add `text_lengths=...`."""


@torch.no_grad()
def dense_pass(
    trainable: Any,
    sla: SparseAttention,
    batch: Batch,
    visit: Visit,
    *,
    names: Iterable[str],
    seed: int,
    step: int,
    rank: int = 0,
) -> None:
    """Run the model without gradients and with sparse attention paused.

    Noise and noise level of a sample depend on `seed`, `step` and its row in the global batch.

    Args:
        trainable: model with `transformer`, `velocity` and `flow_shift`.
        sla: sparse attention installed on that transformer.
        batch: clean latents and their conditions.
        visit: function called with the inputs of each attention call that would have run sparse.
        names: names of the layers to visit.
        seed: seed of the run.
        step: index of the step.
        rank: rank of this process. All processes have equally many samples.
    """
    transformer = trainable.transformer
    batch = batch.to(next(transformer.parameters()).device)
    noisy, sigmas = noisy_samples(batch.latents, seed, step, trainable.flow_shift, rank)
    observers = {name: partial(visit, name, sla.layers[name].module) for name in names}
    with sla.paused(observers):
        trainable.velocity(transformer, noisy, sigmas, batch.conditions)


def noisy_samples(
    latents: Float[Tensor, "b ..."], seed: int, step: int, shift: float, rank: int = 0
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, " b"]]:
    """Return noisy latents and their noise levels. Levels are uniform in [0, 1), then shifted as in sampling.

    Args:
        latents: clean latents of this process.
        seed: seed of the run.
        step: index of the step.
        shift: flow shift s, u -> s u / (1 + (s - 1) u).
        rank: rank of this process. All processes have equally many samples.
    """
    noise, levels = [], []
    for row in range(len(latents)):
        generator = generator_of(seed, step, rank * len(latents) + row)
        noise.append(torch.randn(latents.shape[1:], generator=generator, dtype=torch.float32))
        u = torch.rand((), generator=generator, dtype=torch.float32)
        levels.append(shift * u / (1 + (shift - 1) * u))
    sigmas = torch.stack(levels).to(latents.device)
    weight = sigmas.view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
    return torch.lerp(latents, torch.stack(noise).to(latents), weight), sigmas


def generator_of(seed: int, step: int, number: int) -> torch.Generator:
    """Return a seeded generator for sample `number` of a step."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_000_003 + number) % 2**63)


def squared_error(
    module: SparseLinearAttention,
    q: Float[Tensor, "b h l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    *,
    text: Any = "none",
    text_tokens: int = 0,
    text_lengths: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, " b"]:
    """Return `|sparse - dense|^2 / |dense|^2` per sample over its image queries. Arguments as in the module."""

    def image(x: Tensor) -> Tensor:
        return x if text == "none" else split_text(x, text, text_tokens)[1]

    options = {"text": text, "text_tokens": text_tokens, "text_lengths": text_lengths}
    sparse = image(module(q, k, v, scale=scale, **options)).float()
    with torch.no_grad():
        grouped, mask = q.shape[1] != k.shape[1], None
        if text_lengths is not None:
            mask = valid_keys(k.shape[2], text, text_tokens, text_lengths)[:, None, None]
        dense = scaled_dot_product_attention(
            image(q), k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
        dense = dense.float()
        norm = dense.square().sum((1, 2, 3)).clamp(min=torch.finfo(dense.dtype).tiny)
    return (sparse - dense).square().sum((1, 2, 3)) / norm
