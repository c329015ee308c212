"""`convert`: convert a TurboDiffusion checkpoint of Wan2.1 to a diffusers repository with an SLA checkpoint."""

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
from dit_accel.checkpoint.state_dict import find_state_dict, plain_names
from dit_accel.config import SLAConfig

_PROJECTION = re.compile(
    r"blocks\.(\d+)\.self_attn\.attn_op\.local_attn\.(proj_l\.(?:weight|bias))"
)
_ROOTS = (
    "blocks",
    "head",
    "img_emb",
    "patch_embedding",
    "text_embedding",
    "time_embedding",
    "time_projection",
)
"""First components of the keys in the original layout of Wan."""


def convert(
    checkpoint: str | os.PathLike,
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    topk: float = 0.1,
    block_q: int = 128,
    block_k: int = 64,
) -> Path:
    """Convert a TurboDiffusion checkpoint (SLA) to a diffusers repository with `sla.safetensors`.

    A checkpoint does not store the settings of its sparse attention, so the arguments set them. TurboDiffusion trains
    with blocks of 64 x 64 tokens, and samples with blocks of 128 x 64, or 64 x 128 on Hopper GPUs. It orders blocks
    by raster, rounds topk * blocks down, and its linear branch reads all keys. The written settings do the same.
    Step-distilled checkpoints (rCM) also need their own few-step sampler, which this function does not convert.

    Args:
        checkpoint: a `.pth` file in the original layout of Wan, with `proj_l` weights, not quantised. Key prefixes of
            DDP, FSDP, `torch.compile`, activation checkpointing and training loops are removed.
        model: folder of a diffusers repository of Wan2.1 of the same size. All files except the transformer are
            copied from it.
        output_dir: folder to write. It must be empty or not exist.
        topk: fraction of key blocks that each query block reads exactly, in (0, 1].
        block_q: number of tokens per query block: 16, 32, 64 or 128.
        block_k: number of tokens per key block: 16, 32, 64 or 128.

    Returns:
        The path of `output_dir`.

    Raises:
        ValueError: if an argument is invalid, or if the checkpoint does not fit the model. Nothing is written then.
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
        order="raster",
        dense_steps=0,
        dense_layers=0,
        crossover="never",
    )
    transformer = empty_transformer(model)
    if type(transformer).__name__ != "WanTransformer3DModel":
        raise ValueError(
            f"model={str(model)!r}: its transformer is a {type(transformer).__name__}; expected WanTransformer3DModel"
        )
    name = f"checkpoint={str(checkpoint)!r}"
    weights = _read(Path(checkpoint), name)
    projections = {}
    for key in list(weights):
        if match := _PROJECTION.fullmatch(key):
            projections[f"blocks.{match[1]}.attn1.{match[2]}"] = weights.pop(key).float()
    if not projections:
        raise ValueError(
            f"{name}: has no keys such as blocks.0.self_attn.attn_op.local_attn.proj_l.weight; expected a checkpoint "
            "trained with SLA"
        )
    fill(transformer, _to_diffusers(weights, transformer), name)
    base = replace(identity_of(transformer), model=public_name(output))
    try:
        sla_checkpoint = SLACheckpoint(config=config, base=base, weights=projections)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    write_repository(model, output, transformer, sla_checkpoint)
    return output


def _to_diffusers(weights: dict[str, Tensor], transformer: Any) -> dict[str, Tensor]:
    # Imported here, because this function is not public in diffusers and may move.
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(dict(weights))
    # The original uses a linear layer on flattened patches, diffusers a convolution with the same values.
    patch, key = transformer.patch_embedding.weight, "patch_embedding.weight"
    flat = converted.get(key)
    if flat is not None and flat.shape == patch.flatten(1).shape:
        converted[key] = flat.reshape(patch.shape)
    return converted


def _read(path: Path, name: str) -> dict[str, Tensor]:
    """Return the memory-mapped state dict with wrapper prefixes removed."""
    if not path.is_file():
        raise ValueError(f"{name}: no such file; expected a .pth file")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name}: the pickle holds objects other than tensors and is not loaded, because that could run its code; "
            "expected a state dict"
        ) from None
    except Exception as error:  # torch.load raises many kinds of errors on damaged files
        raise ValueError(
            f"{name}: damaged, or not a torch checkpoint ({str(error).splitlines()[0]})"
        ) from None
    weights: dict[str, Tensor] = {}
    for plain, (key, x) in plain_names(find_state_dict(data, _ROOTS, name), _ROOTS, name).items():
        if plain.endswith(".int8_weight"):
            raise ValueError(
                f"{name}: the weights are quantised ({key}); expected the checkpoint without -quant in its name"
            )
        if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            raise ValueError(f"{name}: {key} is not a plain tensor; expected a state dict")
        weights[plain] = x.detach()
    return weights
