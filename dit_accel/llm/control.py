"""`enable`, `disable` and `summary`: sparse prefill and KV caches on a language model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dit_accel.config import KVConfig, PrefillConfig
from dit_accel.config.base import OFF
from dit_accel.config.prefill import DENSE
from dit_accel.llm.attention import POLICY, register
from dit_accel.llm.head_counts import head_counts
from dit_accel.llm.kvcache.cache import adopt, check_kv, read_kv
from dit_accel.llm.names import NAME
from dit_accel.llm.policy import LayerCounts, Policy
from dit_accel.llm.settings import read_prefill
from dit_accel.llm.spans import SpanTracker

_DEFAULT: Any = object()


def enable(model: Any, *, prefill: Any = _DEFAULT, kv: Any = None) -> Any:
    """Enable sparse attention for prompts, a compressed or retrieving KV cache, or both, on a model.

    The settings are stored on the attention layers of this model. Other models, the model config and `save_pretrained` are
    not affected. Without `kv`, decoding (one query per call) is not changed. A second call replaces the settings.

    Args:
        model: a causal language model of transformers; of a multimodal model, the text layers are used.
        prefill: a `PrefillConfig`, a dict of its fields, the name of a preset or of a pattern, a YAML file, or a JSON
            file of `dit-accel llm search` or of MInference; None: dense. Default: "balanced", or None if `kv` is given.
        kv: a `KVConfig`, a dict of its fields, the name of a preset, or a YAML file. Calls without a cache, or with an empty
            cache of transformers, then use a `KVCache` of these settings. Default: transformers' own caches.

    Returns:
        The model.

    Raises:
        ValueError: the settings are not valid, or the model does not support other attention functions.
    """
    kv = None if kv == OFF else kv
    if prefill is _DEFAULT:
        prefill = "balanced" if kv is None else None
    config = read_prefill(prefill)
    if config is None and kv is None:
        raise ValueError(
            f"prefill={prefill!r}: must be settings of sparse prefill; for dense prefill call disable(model)"
        )
    layers = attention_layers(model)
    policy = Policy(config or PrefillConfig(pattern=DENSE), len(layers), head_counts(model.config))
    if kv is not None:
        policy.kv = read_kv(kv)
        check_kv(model, policy.kv, layers)  # errors come before a model is changed
    if any(x is not None and x.reads_spans for x in policy.patterns):
        policy.tracker = SpanTracker(model.config)
    return install(model, policy)


def install(model: Any, policy: Any) -> Any:
    """Make the attention layers of a model call `policy.attend`.

    Args:
        model: see `enable`.
        policy: a `Policy`, or an object with its `attend`, `before`, `tracker`, `kv` and `cache_hook`.

    Returns:
        The model.

    Raises:
        ValueError: the model does not support other attention functions.
    """
    layers = attention_layers(model)
    disable(model)
    register()
    policy.before = _implementations(model)
    text = model.config.get_text_config(decoder=True)
    name = next((k for k in model.config.sub_configs if getattr(model.config, k) is text), None)
    model.set_attn_implementation(NAME if name is None else {name: NAME})
    if text._attn_implementation != NAME:
        raise ValueError(
            f"model: {type(model).__name__} does not support other attention functions; must be a model that uses the "
            "attention interface of transformers"
        )
    if policy.tracker is not None:
        policy.tracker.attach(model.base_model)
    if policy.kv is not None:
        policy.cache_hook = model.base_model.register_forward_pre_hook(
            _adopting(policy.kv), with_kwargs=True
        )
    for module in layers:
        setattr(module, POLICY, policy)
    return model


def disable(model: Any) -> Any:
    """Undo `enable` and return the model. A model that is not enabled is not changed."""
    policy = None
    for module in model.modules():
        policy = vars(module).pop(POLICY, policy)
    if policy is not None:
        for config, name in policy.before:
            config._attn_implementation_internal = name
        if policy.tracker is not None:
            policy.tracker.detach()
        if policy.cache_hook is not None:
            policy.cache_hook.remove()
    return model


def _adopting(kv: KVConfig) -> Callable[..., Any]:
    """Return a forward pre-hook that passes a `KVCache` to calls without a cache or with an empty one."""

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        config: Any = (
            module.config
        )  # not that of `model`: a deep copy of the model has this hook too
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = config.get_text_config(decoder=True).use_cache
        cache = kwargs.get("past_key_values")
        if cache is None and not use_cache:
            return None
        return args, {**kwargs, "past_key_values": adopt(cache, config, kv)}

    return begin


@dataclass(frozen=True)
class LayerSummary:
    """Attention calls of one layer since `enable`."""

    layer: int
    sparse_calls: int
    density: float | None
    """Query-key pairs that sparse calls computed, divided by those of dense calls (mean). None if there was no sparse call."""
    dense_calls: Mapping[str, int]
    """Number of dense calls by reason."""
    cached_calls: int = 0
    """Calls that read tokens from a `KVCache`."""
    without_spans: int = 0
    """Sparse calls where `grid` or `boundary` could not find the image and video tokens of a multimodal prompt."""


@dataclass(frozen=True)
class PrefillSummary:
    """Attention calls of all layers of a model since `enable`. Its string form is a table."""

    config: Mapping[str, Any]
    layers: list[LayerSummary]

    @property
    def sparse_calls(self) -> int:
        return sum(x.sparse_calls for x in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"config": dict(self.config), "layers": [vars(x) for x in self.layers]}

    def __str__(self) -> str:
        lines = ["layer  sparse calls  density  dense calls"]
        for x in self.layers:
            why = ", ".join(f"{n} x {reason}" for reason, n in x.dense_calls.items())
            if x.cached_calls:
                why = f"{why}; {x.cached_calls} x kv cache".removeprefix("; ")
            density = "" if x.density is None else f"{x.density:.3f}"
            if x.without_spans:
                why = f"{why}; {x.without_spans} x spans not known".removeprefix("; ")
            lines.append(f"{x.layer:<7}{x.sparse_calls:<14}{density:<9}{why}".rstrip())
        return "\n".join(lines)


def summary(model: Any) -> PrefillSummary:
    """Return the numbers of sparse and dense attention calls since `enable`.

    Raises:
        ValueError: the model is not enabled.
    """
    policies = [x for m in model.modules() if (x := vars(m).get(POLICY)) is not None]
    if not policies:
        raise ValueError("model: not enabled; call dit_accel.llm.enable(model) first")
    counts: dict[int, LayerCounts] = policies[0].counts
    return PrefillSummary(
        policies[0].config.to_dict(),
        [
            LayerSummary(i, x.sparse, x.density, dict(x.dense), x.cached, x.without_spans)
            for i, x in counts.items()
        ],
    )


def attention_layers(model: Any) -> list[nn.Module]:
    """Return the causal self-attention layers of a model, in the order of their `layer_idx`.

    Raises:
        ValueError: the model is not a model of transformers with one causal attention per layer.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ValueError(f"model: {type(model).__name__}; must be a model of transformers")
    found: dict[int, nn.Module] = {
        m.layer_idx: m
        for m in model.modules()
        if isinstance(getattr(m, "layer_idx", None), int) and getattr(m, "is_causal", False)
    }
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(
            f"model: {type(model).__name__} has attention layers {sorted(found)}; must be a causal language model of "
            "transformers with one attention in each layer"
        )
    return [found[i] for i in range(len(found))]


def _implementations(model: Any) -> list[tuple[Any, Any]]:
    """Return the configs of a model and its submodels, each with its current attention implementation."""

    def walk(config: Any) -> Iterator[Any]:
        yield config
        for name in config.sub_configs:
            if getattr(config, name) is not None:
                yield from walk(getattr(config, name))

    return [(x, x._attn_implementation_internal) for x in walk(model.config)]
