"""Sparse prefill and compressed KV caches for transformers language models, through the attention interface."""

from typing import TYPE_CHECKING

from dit_accel.lazy import lazy_names

if TYPE_CHECKING:
    from dit_accel.llm.control import disable as disable
    from dit_accel.llm.control import enable as enable
    from dit_accel.llm.control import summary as summary
    from dit_accel.llm.kvcache.cache import KVCache as KVCache
    from dit_accel.llm.kvcache.files import load_cache as load_cache
    from dit_accel.llm.kvcache.files import save_cache as save_cache

_HOMES = {name: "dit_accel.llm.control" for name in ("disable", "enable", "summary")}
_HOMES["KVCache"] = "dit_accel.llm.kvcache.cache"
_HOMES |= {name: "dit_accel.llm.kvcache.files" for name in ("load_cache", "save_cache")}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
