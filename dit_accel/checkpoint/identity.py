"""What adapter files hold, read from a model: its identity, and the weights of sparse attention."""

import contextlib
import os
import re
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from dit_accel.checkpoint.base_model import FINGERPRINT_VALUES, Base, LayerGeometry
from dit_accel.models import FAMILIES, AttentionLayer, family_of

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)[\\/]snapshots[\\/]([0-9a-f]{40})")


def identity_of(transformer: nn.Module, pipe: Any = None) -> Base:
    """Geometry and fingerprint of a transformer, and with `pipe` the name of its model.

    Raises:
        ValueError: it is of no supported class.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)  # torch.compile wraps
    layers = family_of(transformer).self_attention(transformer)
    model, revision = _origin(transformer, pipe) if pipe is not None else ("", "")
    return Base(
        transformer_class=next(
            cls.__name__ for cls in type(transformer).__mro__ if cls.__name__ in FAMILIES
        ),
        layers=tuple(
            LayerGeometry(name, layer.module.heads, layer.kv_heads, layer.head_dim)
            for name, layer in layers.items()
        ),
        fingerprint=torch.stack([_values(layer) for layer in layers.values()]),
        model=model,
        revision=revision,
    )


def _values(layer: AttentionLayer) -> Tensor:
    """Evenly spaced values of the value projection; zeros where it cannot be read (quantised)."""
    module: Any = layer.module
    fused = getattr(module, "fused_projections", False)
    projection = module.to_qkv if fused else module.to_v
    while hasattr(projection, "base_layer"):  # a LoRA of peft stands in front
        projection = projection.base_layer
    with _at_hand(projection):
        weight: Any = getattr(projection, "weight", None)
        readable = (
            type(weight) in (Tensor, nn.Parameter)
            and weight.device.type != "meta"
            and weight.is_floating_point()
        )
        if not readable:
            return torch.zeros(FINGERPRINT_VALUES, dtype=torch.float32)
        weight = weight.detach()[-layer.kv_heads * layer.head_dim :].flatten()
        places = torch.arange(FINGERPRINT_VALUES, device=weight.device) * weight.numel()
        return weight[places // FINGERPRINT_VALUES].float().cpu()


def _at_hand(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Its own parameters can be read inside, also where offloading keeps them elsewhere."""
    offloaded = any(x.device.type == "meta" for x in module.parameters(recurse=False))
    return align_module_device(module, "cpu") if offloaded else contextlib.nullcontext()


def _origin(transformer: Any, pipe: Any) -> tuple[str, str]:
    """Hub id or folder name, and commit; nothing else of the paths of this machine."""
    names = [str(getattr(x, "config", {}).get("_name_or_path") or "") for x in (transformer, pipe)]
    for name in names:
        if snapshot := _SNAPSHOT.search(name):
            owner, model, commit = snapshot.groups()
            return f"{owner}/{model}", commit
    return public_name(re.sub(r"[\\/]transformer[\\/]*$", "", names[0]) or names[1]), ""


def is_hub_id(name: str) -> bool:
    """Whether this can name a hub repository: owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def public_name(source: str | os.PathLike) -> str:
    """A hub id as it is; of a path only the last component."""
    name = str(source)
    if not name or (is_hub_id(name) and not os.path.exists(name)):
        return name
    return re.split(r"[\\/]", os.path.abspath(name))[-1]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of its parameters on the CPU, also where block-wise offloading keeps them elsewhere."""
    weights = {}
    for prefix, part in module.named_modules():
        with _at_hand(part):
            for name, x in part.named_parameters(prefix, recurse=False):
                weights[name] = x.detach().to("cpu", copy=True)
    return weights
