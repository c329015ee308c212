"""Read the identity of the base model and the weights of sparse attention from a loaded model."""

import contextlib
import os
import re
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from dit_accel.checkpoint.base_model import FINGERPRINT_VALUES, BaseModel, LayerGeometry
from dit_accel.models import FAMILIES, AttentionLayer, family_of
from dit_accel.runtime.install import original_weights

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)[\\/]snapshots[\\/]([0-9a-f]{40})")


def identity_of(transformer: nn.Module, pipe: Any = None, *, original: bool = False) -> BaseModel:
    """Return the geometry and fingerprint of a transformer, and the name of its model if `pipe` is given.

    Args:
        transformer: a transformer, or a compiled transformer.
        pipe: pipeline of the transformer. Default: leave the name empty.
        original: compute the fingerprint of the original weights if an SLA checkpoint has replaced them.

    Raises:
        ValueError: if the class of the transformer is not supported.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)  # unwrap torch.compile
    layers = family_of(transformer).self_attention(transformer)
    before = original_weights(transformer) if original else {}
    model, revision = origin_of(transformer, pipe) if pipe is not None else ("", "")
    return BaseModel(
        transformer_class=next(
            cls.__name__ for cls in type(transformer).__mro__ if cls.__name__ in FAMILIES
        ),
        layers=tuple(
            LayerGeometry(name, layer.module.heads, layer.kv_heads, layer.head_dim)
            for name, layer in layers.items()
        ),
        fingerprint=torch.stack(
            [
                _values(layer) if (x := before.get(f"{name}.to_v.weight")) is None else _spaced(x)
                for name, layer in layers.items()
            ]
        ),
        model=model,
        revision=revision,
    )


def _values(layer: AttentionLayer) -> Tensor:
    """Return evenly spaced values of the value projection, or zeros if it is quantised."""
    module: Any = layer.module
    fused = getattr(module, "fused_projections", False)
    projection = module.to_qkv if fused else module.to_v
    while hasattr(projection, "base_layer"):  # unwrap LoRA layers of peft
        projection = projection.base_layer
    with _readable(projection):
        weight: Any = getattr(projection, "weight", None)
        readable = (
            type(weight) in (Tensor, nn.Parameter)
            and weight.device.type != "meta"
            and weight.is_floating_point()
        )
        if not readable:
            return torch.zeros(FINGERPRINT_VALUES, dtype=torch.float32)
        # The value projection is the last part of a fused projection.
        return _spaced(weight.detach()[-layer.kv_heads * layer.head_dim :])


def _spaced(weight: Tensor) -> Tensor:
    """Return evenly spaced values of a weight."""
    weight = weight.flatten()
    places = torch.arange(FINGERPRINT_VALUES, device=weight.device) * weight.numel()
    return weight[places // FINGERPRINT_VALUES].float().cpu()


def _readable(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Context manager in which the module's own parameters can be read even if they are offloaded."""
    offloaded = any(x.device.type == "meta" for x in module.parameters(recurse=False))
    return align_module_device(module, "cpu") if offloaded else contextlib.nullcontext()


def origin_of(transformer: Any, pipe: Any) -> tuple[str, str]:
    """Return the hub id or folder name of a model, and its commit. The name never contains a local path."""
    names = [str(getattr(x, "config", {}).get("_name_or_path") or "") for x in (transformer, pipe)]
    for name in names:
        if snapshot := _SNAPSHOT.search(name):
            owner, model, commit = snapshot.groups()
            return f"{owner}/{model}", commit
    return public_name(re.sub(r"[\\/]transformer(_2)?[\\/]*$", "", names[0]) or names[1]), ""


def snapshot_of(path: str | os.PathLike) -> str | None:
    """Return the commit of a file in the cache of huggingface_hub, or None for other files."""
    found = _SNAPSHOT.search(str(path))
    return None if found is None else found[3]


def is_hub_id(name: str) -> bool:
    """Return True if the name has the form of a hub id: owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def public_name(source: str | os.PathLike) -> str:
    """Return a hub id unchanged, or the last component of a path."""
    name = str(source)
    if not name or (is_hub_id(name) and not os.path.exists(name)):
        return name
    return re.split(r"[\\/]", os.path.abspath(name))[-1]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters of a module on the CPU. The parameters may be offloaded."""
    weights = {}
    for prefix, part in module.named_modules():
        with _readable(part):
            for name, x in part.named_parameters(prefix, recurse=False):
                weights[name] = x.detach().to("cpu", copy=True)
    return weights
