"""`convert`: TurboDiffusion checkpoints of Wan2.1 become a diffusers repository and an adapter."""

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import identity_of, public_name
from dit_accel.checkpoint.repository import (
    check_output,
    empty_transformer,
    fill,
    write_repository,
)
from dit_accel.config import SLAConfig

_PROJECTION = re.compile(
    r"blocks\.(\d+)\.self_attn\.attn_op\.local_attn\.(proj_l\.(?:weight|bias))"
)
_WRAPPER = "_checkpoint_wrapped_module."
"""What activation checkpointing adds to names; released files have it."""


def convert(
    checkpoint: str | os.PathLike,
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    topk: float = 0.1,
    block_q: int = 128,
    block_k: int = 64,
) -> Path:
    """Write a TurboDiffusion checkpoint (SLA) as a diffusers repository with `sla.safetensors`.

    The weights do not say how they are run, so the arguments do. TurboDiffusion trains with blocks of
    64 x 64 tokens and serves with 128 x 64; its linear branch reads every key and it rounds
    topk * blocks down, and so does the adapter. Step-distilled checkpoints (rCM) need their own few-step
    sampling, which is no part of the weights either.

    Args:
        checkpoint: a `.pth` file in the original layout of Wan, with `proj_l` weights; not quantised.
        model: folder of a Wan2.1 repository of diffusers of the same size; all but the transformer is copied.
        output_dir: must not exist yet, or be empty.
        topk, block_q, block_k: of the adapter, see `SLAConfig`.

    Returns:
        `output_dir`.

    Raises:
        ValueError: a bad argument, or a checkpoint that does not fit; nothing is written then.
    """
    output = check_output(output_dir)
    config = SLAConfig(
        topk=topk,
        block_q=block_q,
        block_k=block_k,
        router="mean",
        rounding="floor",
        combine="proj",
        linear_scope="all",
        feature_map="softmax",
        dense_steps=0,
        dense_layers=0,
        crossover="never",
    )
    transformer = empty_transformer(model)
    if type(transformer).__name__ != "WanTransformer3DModel":
        raise ValueError(
            f"model={str(model)!r}: its transformer is a {type(transformer).__name__}; accepted: WanTransformer3DModel"
        )
    name = f"checkpoint={str(checkpoint)!r}"
    weights = _read(Path(checkpoint), name)
    projections = {}
    for key in list(weights):
        if match := _PROJECTION.fullmatch(key):
            projections[f"blocks.{match[1]}.attn1.{match[2]}"] = weights.pop(key).float()
    if not projections:
        raise ValueError(f"{name}: no proj_l weights; accepted are checkpoints trained with SLA")
    fill(transformer, _to_diffusers(weights, transformer), name)
    base = replace(identity_of(transformer), model=public_name(output))
    try:
        adapter = SLACheckpoint(config=config, base=base, weights=projections)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    write_repository(model, output, transformer, adapter)
    return output


def _to_diffusers(weights: dict[str, Tensor], transformer: Any) -> dict[str, Tensor]:
    # In here, because it is no public function of diffusers.
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(dict(weights))
    # There a linear layer on flattened patches, here a convolution: the same numbers in the same order.
    patch, key = transformer.patch_embedding.weight, "patch_embedding.weight"
    flat = converted.get(key)
    if flat is not None and flat.shape == patch.flatten(1).shape:
        converted[key] = flat.reshape(patch.shape)
    return converted


def _read(path: Path, name: str) -> dict[str, Tensor]:
    """The state dict, memory-mapped, under plain names."""
    if not path.is_file():
        raise ValueError(f"{name}: no such file; accepted is a .pth file")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name}: a pickle of more than tensors, which only running its code could read; "
            "accepted is a state dict"
        ) from None
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(
            f"{name}: damaged, or no checkpoint of torch ({str(error).splitlines()[0]})"
        ) from None
    while isinstance(data, dict):
        inner = [data[key] for key in ("model", "state_dict") if isinstance(data.get(key), dict)]
        if not inner:
            break
        data = inner[0]
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{name}: holds no state dict")
    weights: dict[str, Tensor] = {}
    for key, x in data.items():
        plain = str(key).removeprefix("net.").replace(_WRAPPER, "")
        if plain.endswith(".int8_weight"):
            raise ValueError(
                f"{name}: quantised ({key}); accepted is the checkpoint without -quant"
            )
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            raise ValueError(f"{name}: {key} is no plain tensor; accepted is a state dict")
        if plain in weights:
            raise ValueError(f"{name}: {plain} is there twice")
        weights[plain] = x.detach()
    return weights
