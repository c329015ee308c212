"""`head_counts`: numbers of query heads and KV heads of a language model."""

from typing import Any, NamedTuple


class HeadCounts(NamedTuple):
    """Number of attention heads per layer."""

    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key-value heads."""


def head_counts(config: Any) -> HeadCounts | None:
    """Return the head counts in a model config; None if the config does not contain them.

    Args:
        config: config of a transformers model; of a multimodal model, its text config is used.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return None
    return HeadCounts(heads, kv_heads)
