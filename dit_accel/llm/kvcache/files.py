"""`save_cache` and `load_cache`: KV caches in files, so that another process need not process the prompt again."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.llm.control import attention_layers
from dit_accel.llm.kvcache.cache import KVCache, model_sizes
from dit_accel.llm.kvcache.layer import ZoneLayer
from dit_accel.llm.kvcache.model_file import ModelFile, fingerprint_of, read_model_file
from dit_accel.llm.kvcache.state import LAYER, changing, packed, unpacked

KIND = "kv cache"
OWN = ("keys", "values", "cumulative_length")
"""Attributes of the cache layers of transformers that hold their state."""


def save_cache(model: Any, cache: Any, path: str | os.PathLike) -> None:
    """Write a KV cache to a safetensors file. If writing fails, an existing file is left unchanged.

    Args:
        model: the model that filled the cache.
        cache: a `KVCache`.
        path: path of the file.

    Raises:
        ValueError: `cache` is not a `KVCache`.
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache: a {type(cache).__name__}; must be a KVCache")
    tensors: dict[str, Tensor] = {}
    layers = [_layer(layer, f"{i}", tensors) for i, layer in enumerate(cache.layers)]
    ModelFile(
        KIND,
        tensors,
        model_sizes(model.config),
        fingerprint_of(attention_layers(model)),
        getattr(model.config, "_name_or_path", ""),
        {"kv": cache.kv.to_dict(), "layers": layers},
    ).save(Path(path), hashed=False)


def load_cache(model: Any, path: str | os.PathLike) -> KVCache:
    """Read a KV cache from a file onto the device of the model.

    Args:
        model: the model that filled the cache.
        path: path of the file.

    Raises:
        ValueError: the file cannot be read, or was written for another model.
    """
    path = os.fspath(path)
    found = read_model_file(path, KIND, model_sizes(model.config), "path", keep=False)
    found.check_weights(f"path={path!r}", fingerprint_of(attention_layers(model)))
    cache = KVCache(model, dict(found.settings["kv"]))
    tensors = {k: x.to(model.device) for k, x in found.tensors.items()}
    for layer, values in zip(cache.layers, found.settings["layers"], strict=True):
        _restore(layer, values, tensors)
    return cache


def _layer(layer: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(layer, ZoneLayer):
        found = {x: getattr(layer, x) for x in OWN if hasattr(layer, x)}
        return {"own": packed(found, name, tensors)}
    layer.side_stream.wait()
    parts: dict[str, tuple[Any, Sequence[str]]] = {"layer": (layer, LAYER)}
    parts |= {
        x: (y, changing(y)) for x, y in (("store", layer.store), ("selector", layer.selector))
    }
    return {
        part: packed({x: getattr(owner, x) for x in names}, f"{name}.{part}", tensors)
        for part, (owner, names) in parts.items()
    }


def _restore(layer: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if not isinstance(layer, ZoneLayer):
        found = unpacked(values["own"], tensors)
        if found["keys"] is not None:
            layer.lazy_initialization(found["keys"], found["values"])
        vars(layer).update(found)
        return
    for owner, part in ((layer, "layer"), (layer.store, "store"), (layer.selector, "selector")):
        for name, value in unpacked(values[part], tensors).items():
            setattr(owner, name, value)
    if layer.exact is not None:
        layer.lazy_initialization(layer.exact.k, layer.exact.v)
        layer.store.placed(layer.device)
    layer.selector.restored(layer.store)
