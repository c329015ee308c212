"""`KVConfig`: settings of the key-value cache of a language model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dit_accel.config.base import Config, check, check_choice, is_int
from dit_accel.config.layers import check_layers, in_layers

TIERS = ("device", "cpu", "disk")


@dataclass(frozen=True, kw_only=True)
class KVConfig(Config):
    """Key-value cache of a language model: how keys and values are stored, and which of them a query reads."""

    store: str = "dense"
    """Name of the store of the tokens between the first and the last ones, see `dit_accel.llm.kvcache.stores`."""
    store_options: dict[str, Any] = field(default_factory=dict)
    """Fields of the store, by name."""
    select: str = "all"
    """Name of the selector of the stored tokens that a query reads, see `dit_accel.llm.kvcache.selectors`."""
    select_options: dict[str, Any] = field(default_factory=dict)
    """Fields of the selector, by name."""
    sink: int = 64
    """Number of first tokens of each sequence that stay exact. Padding on the left does not count."""
    recent: int = 128
    """Minimum number of last tokens that stay exact."""
    flush: int = 64
    """Number of tokens that move to the store at a time during generation."""
    tier: str = "device"
    """Memory of the stored tokens: "device", "cpu", or "disk" (memory-mapped files in `folder`)."""
    folder: str | None = None
    """Folder of the files for `tier="disk"`. Default: the system's folder of temporary files."""
    overlap: bool = False
    """On a GPU, store generated tokens on a second CUDA stream while the next layers run."""
    dense_layers: int | tuple[int, ...] | list[int] = 0
    """Layers that keep transformers' own cache: the first n, or a list of indices (negative ones from the end)."""

    SECTION: ClassVar[str] = "kv"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "dense": {},
        # StreamingLLM (arXiv 2309.17453): drops the tokens between the first and the last ones.
        "window": {"select": "none", "recent": 1024},
        # KIVI (arXiv 2402.02750), with exact first tokens.
        "int4": {"store": "int", "store_options": {"bits": 4}},
        "int3": {"store": "int", "store_options": {"bits": 3}},
        "int2": {"store": "int", "store_options": {"bits": 2}},
        # SnapKV (arXiv 2404.14469): each head keeps the tokens that the last queries of the prompt attend to.
        "snapkv": {"select": "snapkv", "select_options": {"budget": 0.1, "window": 64}},
        # Quest (arXiv 2406.10774): pages of 16 tokens with the largest bounds.
        "quest": {"select": "quest", "select_options": {"budget": 0.25, "page": 16}},
        # RetroInfer (arXiv 2505.02922): clusters of 16 keys; new tokens are clustered 1,024 at a time. 64 clusters are
        # about 1,024 tokens: with fewer clusters, passkey retrieval fails.
        "retroinfer": {
            "select": "wave",
            "select_options": {"retrieve": 0.05, "least": 64, "estimate": 0.23},
            "flush": 1024,
        },
        # RetrievalAttention (arXiv 2409.10516): the best keys of each query head. A graph index needs faiss; "flat" does not.
        "retrieval": {"select": "retrieval", "select_options": {"index": "flat", "topk": 128}},
    }

    def __post_init__(self) -> None:
        for name in ("store", "select"):
            check(name, getattr(self, name), isinstance(getattr(self, name), str), "a name")
        for name in ("store_options", "select_options"):
            check(name, getattr(self, name), isinstance(getattr(self, name), dict), "a mapping")
        check_choice("tier", self.tier, TIERS)
        folder = self.folder
        check(
            "folder",
            folder,
            folder is None or (isinstance(folder, str) and self.tier == "disk"),
            'a path, with tier="disk"',
        )
        check("overlap", self.overlap, isinstance(self.overlap, bool), "true or false")
        for name, least in (("sink", 0), ("recent", 1), ("flush", 1)):
            value = getattr(self, name)
            check(name, value, is_int(value) and value >= least, f"an int >= {least} (tokens)")
        object.__setattr__(self, "dense_layers", check_layers("dense_layers", self.dense_layers))

    def is_dense(self, layer: int, num_layers: int) -> bool:
        """Return whether a layer keeps transformers' own cache.

        Raises:
            ValueError: `dense_layers` names a layer that the model does not have.
        """
        return in_layers("dense_layers", self.dense_layers, layer, num_layers)
