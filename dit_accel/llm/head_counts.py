"""`head_counts`: heads of a language model, from its config."""

from typing import Any, NamedTuple


class HeadCounts(NamedTuple):
    """Attention heads of each layer."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values."""


def head_counts(config: Any) -> HeadCounts | None:
    """Return the heads of a model; None: its config does not say.

    Args:
        config: config of transformers, of a multimodal model too.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return None
    return HeadCounts(heads, kv_heads)
