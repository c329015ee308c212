"""Identify the model that made latents and text embeddings, by its name and some values of its weights."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

_VALUES = 64
"""Number of values that are compared for each part of a model."""
_CLOSE, _CLOSE_8_BIT = 0.005, 0.06
"""Largest relative difference that rounding to bf16, or to an 8-bit dtype, can cause."""


def model_identity(pipe: Any, *, transformer: bool = False) -> dict[str, Any]:
    """Return the identity of the VAE and text encoders of a pipeline, as plain values.

    Args:
        pipe: loaded pipeline.
        transformer: identify the transformer too. Use it if the transformer sampled the latents.
    """
    from dit_accel.checkpoint.identity import origin_of

    model, revision = origin_of(pipe.transformer, pipe)
    names = sorted(x for x in pipe.components if x == "vae" or x.startswith("text_encoder"))
    names += ["transformer"] if transformer else []
    parts = {x: getattr(pipe, x) for x in names}
    return {
        "model": model,
        "revision": revision,
        "parts": {k: _part(k, x) for k, x in parts.items() if isinstance(x, nn.Module)},
    }


def model_differences(made: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return descriptions of the differences of two models. Parts that only one model has are not compared.

    Args:
        made: identity of the model that made the files.
        found: identity of the model at hand.
    """
    differences = []
    parts = made["parts"]
    for name, part in found["parts"].items():
        if name not in parts:
            continue
        other = parts[name]
        if part["class"] != other["class"]:
            differences.append(f"{name} is a {part['class']}, not a {other['class']}")
        elif part["config"] != other["config"]:
            differences.append(f"{name} has another configuration")
        elif not _close(other, part):
            differences.append(f"{name} has other weights")
    return differences


def model_label(identity: Mapping[str, Any]) -> str:
    """Return the name and revision of a model, for messages."""
    revision = identity.get("revision")
    return f"{identity.get('model') or 'unnamed model'}{f' at {revision[:12]}' if revision else ''}"


def _part(name: str, module: Any) -> dict[str, Any]:
    weights = [
        (key, x)
        for key, x in sorted(module.named_parameters())
        if x.ndim > 1 and x.is_floating_point()
    ]
    chosen = [weights[i * len(weights) // _VALUES] for i in range(_VALUES)] if weights else []
    bits = min((torch.finfo(x.dtype).bits for _, x in chosen), default=0)
    values = [_value(module, key, i) for i, (key, _) in enumerate(chosen)]
    return {
        "class": type(module).__name__,
        # The configuration of the VAE holds the values that normalise latents.
        "config": _config_sha256(module.config) if name == "vae" else None,
        "bits": bits,
        "values": values,
    }


def _value(module: nn.Module, key: str, number: int) -> float:
    """Return one value of a weight. The weight may be offloaded."""
    owner_name, _, name = key.rpartition(".")
    owner = module.get_submodule(owner_name)
    on_meta = getattr(owner, name).device.type == "meta"
    with align_module_device(owner, "cpu") if on_meta else torch.no_grad():
        weight = getattr(owner, name).detach().flatten()
        # Read a different position of each weight. First and last values are often equal in different models.
        return float(weight[(number + 1) * weight.numel() // (_VALUES + 2)].float())


def _config_sha256(config: Mapping[str, Any]) -> str:
    values = {k: x for k, x in dict(config).items() if not k.startswith("_")}
    data = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(data.encode()).hexdigest()


def _close(made: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    a, b = made["values"], found["values"]
    if not a or not b:  # quantised weights cannot be compared
        return True
    if len(a) != len(b):
        return False
    difference = math.dist(a, b) / max(math.hypot(*a), 1e-12)
    return difference <= (_CLOSE_8_BIT if min(made["bits"], found["bits"]) < 16 else _CLOSE)
