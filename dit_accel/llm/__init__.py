"""Language models: sparse prefill and caches of keys and values through transformers' attention interface."""

from typing import TYPE_CHECKING

from dit_accel.lazy import lazy_names

if TYPE_CHECKING:
    from dit_accel.llm.control import disable as disable
    from dit_accel.llm.control import enable as enable
    from dit_accel.llm.control import summary as summary
    from dit_accel.llm.kvcache.cache import KVCache as KVCache

_HOMES = {name: "dit_accel.llm.control" for name in ("disable", "enable", "summary")}
_HOMES["KVCache"] = "dit_accel.llm.kvcache.cache"

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
