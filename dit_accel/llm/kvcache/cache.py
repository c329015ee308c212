"""`KVCache`: a cache of transformers whose layers store tokens as `KVConfig` says."""

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from dit_accel.config import KVConfig
from dit_accel.llm.head_counts import head_counts
from dit_accel.llm.kvcache.layer import NOT_READ, ZoneLayer
from dit_accel.llm.kvcache.model_file import fingerprint_of
from dit_accel.llm.kvcache.selector import selector_of
from dit_accel.llm.kvcache.store import ModelSizes, store_of
from dit_accel.llm.kvcache.tiers import tier_of
from dit_accel.llm.names import NAME


class KVCache(DynamicCache):
    """Keys and values of a model in the form that settings say, for `past_key_values=`.

    The model must be enabled (`dit_accel.llm.enable(model, kv=...)`); then transformers' own empty caches become such
    caches by themselves, and `generate` needs nothing. Layers with a sliding window keep transformers' layers: a window
    is all they read.

    Args:
        model: a language model of transformers, or its config.
        kv: a `KVConfig`, a dict of its fields, the name of a preset, or a YAML file.

    Raises:
        ValueError: the settings are not valid, or not for this model.
    """

    def __init__(self, model: Any, kv: Any = "dense") -> None:
        super().__init__()
        self.kv = read_kv(kv)
        config = getattr(model, "config", model)
        self.layers = zone_layers(config, self.kv)
        self.text_config = config.get_text_config(decoder=True)
        self.layer_class_to_replicate = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values of a layer to the attention function of the model.

        Raises:
            ValueError: the model has another attention function, which would not take them in.
        """
        if layer_idx == 0 and self.text_config._attn_implementation != NAME:
            raise ValueError(NOT_READ)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def fork(self) -> "KVCache":
        """Return a cache with the same tokens. Both share them until they change; neither sees what the other adds."""
        return copied(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers. What forks share counts in each of them."""
        return nbytes_of(self)

    @property
    def read_share(self) -> float | None:
        """Share of the tokens that calls read, a mean over the calls and layers that found some; None: no call did."""
        calls, read = self.reads
        return read / calls if calls else None

    @property
    def reads(self) -> tuple[int, float]:
        """Calls that found tokens, and the shares of the tokens that they read, added up over calls and layers."""
        zones = [x for x in self.layers if isinstance(x, ZoneLayer)]
        return sum(x.calls for x in zones), sum(x.read for x in zones)


def read_kv(kv: Any) -> KVConfig:
    """Return settings of a cache.

    Args:
        kv: see `KVCache`.

    Raises:
        ValueError: no such settings.
    """
    config: KVConfig | None = KVConfig.load(kv)
    if config is None:
        raise ValueError(f"kv={kv!r}: accepted are settings of a cache; without kv= it is dense")
    return config


def zone_layers(config: Any, kv: KVConfig) -> list[Any]:
    """Return empty layers for a model.

    Args:
        config: config of the model.
        kv: settings.

    Raises:
        ValueError: the settings are not valid, or not for this model.
    """
    text = config.get_text_config(decoder=True)
    name = type(text).__name__
    if getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"kv: {name} caps its scores; accepted are models that do not")
    if getattr(text, "num_kv_shared_layers", None):
        raise ValueError(
            f"kv: layers of {name} share keys; accepted are models whose layers do not"
        )
    layers = list(DynamicCache(config=config).layers)
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"kv: {name} has layers of the kind {type(layer).__name__}; accepted are models with full attention and "
                "sliding windows"
            )
    sizes = model_sizes(config)
    tier = tier_of(kv.tier, kv.folder)
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and not kv.is_dense(i, len(layers)):
            store = store_of(kv.store, kv.store_options)
            store.prepare(i, sizes)
            store.tier = tier
            layers[i] = ZoneLayer(
                store,
                selector_of(kv.select, kv.select_options),
                sink=kv.sink,
                recent=kv.recent,
                flush=kv.flush,
                overlap=kv.overlap,
            )
    if not any(isinstance(x, ZoneLayer) for x in layers):
        raise ValueError(
            f"kv: no layer of {name} is left that it may store (sliding windows, dense_layers={kv.dense_layers}); "
            "accepted are models with full attention in a layer"
        )
    return layers


def check_kv(model: Any, kv: KVConfig, attention: Sequence[nn.Module]) -> None:
    """Check that settings fit a model and its weights.

    Args:
        model: the model.
        kv: settings.
        attention: its attention layers.

    Raises:
        ValueError: they do not.
    """
    stores = [x.store for x in zone_layers(model.config, kv) if isinstance(x, ZoneLayer)]
    stores[0].check_weights(fingerprint_of(attention))


def model_sizes(config: Any) -> ModelSizes:
    """Return the sizes of a model that the files of stores must fit.

    Raises:
        ValueError: the config does not tell them.
    """
    text, counts = config.get_text_config(decoder=True), head_counts(config)
    if counts is None:
        raise ValueError(
            f"kv: {type(text).__name__} does not tell its heads; accepted are models whose config does"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // counts.heads
    return ModelSizes(text.num_hidden_layers, counts.kv_heads, head_dim, config_hash(text))


def config_hash(text: Any) -> str:
    """Return a hash of the fields of a config that finetuning and versions of transformers leave as they are."""
    rope = getattr(text, "rope_parameters", None)
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    known = [
        text.model_type,
        *(getattr(text, x, None) for x in ("vocab_size", "hidden_size", "intermediate_size")),
        *(getattr(text, x, None) for x in ("num_attention_heads", "rms_norm_eps")),
        getattr(text, "rope_theta", theta),
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def adopt(cache: Any, config: Any, kv: KVConfig) -> Any:
    """Turn an empty cache of transformers into a `KVCache`, in place: `generate` holds on to the object.

    Args:
        cache: what a model got as `past_key_values`; None: no cache.
        config: config of the model.
        kv: settings.

    Returns:
        The `KVCache`.

    Raises:
        ValueError: the cache is of another kind, or holds tokens.
    """
    if isinstance(cache, KVCache):
        layers = config.get_text_config(decoder=True).num_hidden_layers
        if len(cache.layers) != layers:
            raise ValueError(
                f"past_key_values: a KVCache of {len(cache.layers)} layers; accepted is one of {layers}, as the model has"
            )
        cache.text_config = config.get_text_config(decoder=True)
        return cache
    if cache is None:
        return KVCache(config, kv)
    offloaded = "n offloaded" if getattr(cache, "offloading", False) else ""
    if type(cache) is not DynamicCache or offloaded:
        raise ValueError(
            f"past_key_values: a{offloaded} {type(cache).__name__}; accepted with kv= are None, an empty DynamicCache and KVCache"
        )
    if cache.get_seq_length():
        raise ValueError(
            f"past_key_values: a DynamicCache with {cache.get_seq_length()} tokens; accepted with kv= is an empty one, "
            "or a KVCache"
        )
    cache.__class__ = KVCache
    vars(cache).update(kv=kv, text_config=config.get_text_config(decoder=True))
    cache.layers, cache.layer_class_to_replicate = zone_layers(config, kv), None
    return cache


def copied(cache: Any) -> Any:
    """Return a `KVCache` or a `DynamicCache` with the same tokens; neither sees what the other adds."""
    found = copy(cache)
    # Layers of transformers that grow make new tensors, so that a shallow copy is one of its own.
    found.layers = [x.fork() if isinstance(x, ZoneLayer) else copy(x) for x in cache.layers]
    return found


def nbytes_of(cache: Any) -> int:
    """Return the bytes of a `KVCache` or a `DynamicCache`."""
    return sum(_nbytes(x) for x in cache.layers)


def _nbytes(layer: Any) -> int:
    if isinstance(layer, ZoneLayer):
        return layer.nbytes
    tensors = [x for x in (layer.keys, layer.values) if x is not None]
    return sum(x.nbytes for x in tensors)
