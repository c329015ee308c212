"""`KVCache`: a transformers cache whose layers use the store and the selector of a `KVConfig`."""

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
    """KV cache with compressed or selectively read tokens, for the argument `past_key_values` of a model.

    The model must be enabled (`dit_accel.llm.enable(model, kv=...)`). `generate` then uses a `KVCache` without further
    arguments. Layers with a sliding window keep the cache layers of transformers, which store only the window.

    Args:
        model: a language model of transformers, or its config.
        kv: a `KVConfig`, a dict of its fields, the name of a preset, or a YAML file.

    Raises:
        ValueError: the settings are not valid, or do not fit the model.
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
        """Pass the new keys and values of a layer on to the attention function, which stores them.

        Raises:
            ValueError: the model uses another attention function, which does not store them.
        """
        if layer_idx == 0 and self.text_config._attn_implementation != NAME:
            raise ValueError(NOT_READ)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def fork(self) -> "KVCache":
        """Return a copy that shares memory until one of the two changes. Tokens added to one do not appear in the other."""
        return copied(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers. Memory shared between forks is counted in each fork."""
        return nbytes_of(self)

    @property
    def read_share(self) -> float | None:
        """Mean share of the cached tokens that a call read, over calls and layers; None if no call found cached tokens."""
        calls, read = self.reads
        return read / calls if calls else None

    @property
    def reads(self) -> tuple[int, float]:
        """Number of calls that found cached tokens, and the sum of the shares that they read, over all layers."""
        zones = [x for x in self.layers if isinstance(x, ZoneLayer)]
        return sum(x.calls for x in zones), sum(x.read for x in zones)


def read_kv(kv: Any) -> KVConfig:
    """Return the settings of a KV cache.

    Args:
        kv: see `KVCache`.

    Raises:
        ValueError: the settings are not valid or None.
    """
    config: KVConfig | None = KVConfig.load(kv)
    if config is None:
        raise ValueError(
            f"kv={kv!r}: must be settings of a KV cache; leave kv out for transformers' own cache"
        )
    return config


def zone_layers(config: Any, kv: KVConfig) -> list[Any]:
    """Return empty cache layers for a model.

    Args:
        config: config of the model.
        kv: settings of the cache.

    Raises:
        ValueError: the settings are not valid, or do not fit the model.
    """
    text = config.get_text_config(decoder=True)
    name = type(text).__name__
    if getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"kv: {name} has attn_logit_softcapping; must be a model without it")
    if getattr(text, "num_kv_shared_layers", None):
        raise ValueError(
            f"kv: {name} has num_kv_shared_layers; must be a model whose layers do not share keys"
        )
    layers = list(DynamicCache(config=config).layers)
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"kv: {name} has cache layers of type {type(layer).__name__}; must be a model with full attention and "
                "sliding windows only"
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
            f"kv: no layer of {name} can use it, because all have sliding windows or are in dense_layers={kv.dense_layers}; "
            "must leave at least one layer with full attention"
        )
    return layers


def check_kv(model: Any, kv: KVConfig, attention: Sequence[nn.Module]) -> None:
    """Check that cache settings fit a model and its weights.

    Args:
        model: the model.
        kv: settings of the cache.
        attention: attention layers of the model.

    Raises:
        ValueError: the settings do not fit.
    """
    stores = [x.store for x in zone_layers(model.config, kv) if isinstance(x, ZoneLayer)]
    stores[0].check_weights(fingerprint_of(attention))


def model_sizes(config: Any) -> ModelSizes:
    """Return the sizes of a model that the files of stores are checked against.

    Raises:
        ValueError: the config does not contain the number of heads.
    """
    text, counts = config.get_text_config(decoder=True), head_counts(config)
    if counts is None:
        raise ValueError(
            f"kv: {type(text).__name__} has no num_attention_heads; must be a model whose config has it"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // counts.heads
    return ModelSizes(text.num_hidden_layers, counts.kv_heads, head_dim, config_hash(text))


def config_hash(text: Any) -> str:
    """Return a hash of the config fields that neither finetuning nor another version of transformers changes."""
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
    """Turn an empty cache of transformers into a `KVCache` in place, because `generate` keeps a reference to it.

    Args:
        cache: argument `past_key_values` of the model; None if there is no cache.
        config: config of the model.
        kv: settings of the cache.

    Returns:
        The `KVCache`.

    Raises:
        ValueError: the cache has another type, another number of layers, or already holds tokens.
    """
    if isinstance(cache, KVCache):
        layers = config.get_text_config(decoder=True).num_hidden_layers
        if len(cache.layers) != layers:
            raise ValueError(
                f"past_key_values: a KVCache with {len(cache.layers)} layers; must have {layers} layers like the model"
            )
        cache.text_config = config.get_text_config(decoder=True)
        return cache
    if cache is None:
        return KVCache(config, kv)
    offloaded = "n offloaded" if getattr(cache, "offloading", False) else ""
    if type(cache) is not DynamicCache or offloaded:
        raise ValueError(
            f"past_key_values: a{offloaded} {type(cache).__name__}; must be None, an empty DynamicCache or a KVCache with kv="
        )
    if cache.get_seq_length():
        raise ValueError(
            f"past_key_values: a DynamicCache with {cache.get_seq_length()} tokens; must be empty, or a KVCache, with kv="
        )
    cache.__class__ = KVCache
    vars(cache).update(kv=kv, text_config=config.get_text_config(decoder=True))
    cache.layers, cache.layer_class_to_replicate = zone_layers(config, kv), None
    return cache


def copied(cache: Any) -> Any:
    """Return a copy of a `KVCache` or a `DynamicCache`. Tokens added to one do not appear in the other."""
    found = copy(cache)
    # A shallow copy is enough for layers of transformers: they replace their tensors when they grow.
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
