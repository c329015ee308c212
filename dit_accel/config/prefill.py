"""`PrefillConfig`: settings of sparse prefill in language models."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from dit_accel.config.base import Config, check, check_choice, is_int
from dit_accel.config.layers import check_layers, in_layers, layer_index
from dit_accel.config.prefill_file import DENSE, settings_of_file

__all__ = ["BLOCKS", "DENSE", "PrefillConfig"]

BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(Config):
    """Sparse attention in the prefill of a language model (calls with more than one query)."""

    pattern: str = "hybrid"
    """Name of a pattern, see `dit_accel.llm.prefill`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the pattern, by name."""
    block: int = 64
    """Tokens per block: 16, 32, 64 or 128."""
    tail: int = 128
    """Minimum number of last queries of a call that read every key. They determine the first generated token."""
    dense_layers: int | tuple[int, ...] | list[int] = 1
    """Layers that stay dense: the first n, or a list of indices (negative ones from the end). Default: 1, because the
    first layer of all measured models attends to the whole prompt."""
    by_layer: dict[Any, Any] = field(default_factory=dict)
    """Patterns of single layers, in place of `pattern`. A key is a layer index (negative ones from the end), or a fraction
    f in (0, 1) for all layers from f * num_layers on. An index takes precedence over a fraction, and a larger fraction
    over a smaller one. A value is the name of a pattern, "dense", or a mapping with `pattern` and `options`."""
    crossover: int | Literal["auto"] = "auto"
    """Calls with fewer keys are dense. "auto": the length above which sparse attention was measured to be faster.
    0: no call is dense because of its length."""
    num_layers: int | None = None
    """Number of layers of the model that these settings are for. None: any number."""

    SECTION: ClassVar[str] = "prefill"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quality": {"options": {"top_p": 0.95}},
        "balanced": {},
        "fast": {"options": {"top_p": 0.8}},
        # TriangleMix (arXiv 2507.21526): cheap in the deep layers, every key in the others.
        "triangle_mix": {"pattern": DENSE, "by_layer": {0.67: "triangle"}},
    }

    def __post_init__(self) -> None:
        check("pattern", self.pattern, isinstance(self.pattern, str), "the name of a pattern")
        check("options", self.options, isinstance(self.options, dict), "a mapping")
        check_choice("block", self.block, BLOCKS)
        tail = self.tail
        check("tail", tail, is_int(tail) and tail >= 0, "an int >= 0")
        object.__setattr__(self, "dense_layers", check_layers("dense_layers", self.dense_layers))
        check("by_layer", self.by_layer, isinstance(self.by_layer, dict), "a mapping of layers")
        # JSON stores numeric keys as strings.
        by_layer = {_number(key): value for key, value in self.by_layer.items()}
        object.__setattr__(self, "by_layer", by_layer)
        for key, value in self.by_layer.items():
            ok = is_int(key) or (isinstance(key, float) and 0 < key < 1)
            check("by_layer", key, ok, "layer indices, or fractions in (0, 1)")
            _named(value)
        length = self.crossover
        ok = length == "auto" or (is_int(length) and length >= 0)
        check("crossover", length, ok, "'auto' or an int >= 0 (tokens)")
        number = self.num_layers
        check("num_layers", number, number is None or (is_int(number) and number >= 1), "an int >= 1 or None")  # fmt: skip

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> "PrefillConfig":
        """Read settings from the section `prefill:` of a YAML file, or a JSON file of `dit-accel llm search` or MInference."""
        values = settings_of_file(Path(path))
        if values is None:
            return cast(PrefillConfig, super().from_yaml(path))
        return cls(**values)

    def of_layer(self, layer: int, num_layers: int) -> tuple[str, dict[str, Any]] | None:
        """Return the pattern of a layer and its options, or None if the layer stays dense.

        Raises:
            ValueError: `dense_layers` or `by_layer` names a layer that the model does not have, or `num_layers` of the
                settings differs from that of the model.
        """
        if self.num_layers not in (None, num_layers):
            raise ValueError(
                f"num_layers={self.num_layers}: the settings are for models with this number of layers, but the model "
                f"has {num_layers}"
            )
        chosen: Any = {"pattern": self.pattern, "options": self.options}
        for start in sorted(x for x in self.by_layer if isinstance(x, float)):
            if start * num_layers <= layer + 1e-9:
                chosen = self.by_layer[start]
        if in_layers("dense_layers", self.dense_layers, layer, num_layers):
            chosen = DENSE
        for key, value in self.by_layer.items():
            if isinstance(key, int) and layer_index("by_layer", key, num_layers) == layer:
                chosen = value
        name, options = _named(chosen)
        return None if name == DENSE else (name, options)


def _number(key: Any) -> Any:
    """Return a key as a number if it is a string that holds one, else unchanged."""
    if not isinstance(key, str):
        return key
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(key)
    return key


def _named(value: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a value of `by_layer`."""
    if isinstance(value, str):
        return value, {}
    ok = isinstance(value, dict) and isinstance(value.get("pattern"), str)
    ok = ok and set(value) <= {"pattern", "options"} and isinstance(value.get("options", {}), dict)
    check("by_layer", value, ok, "the name of a pattern, or a mapping with pattern and options")
    return value["pattern"], dict(value.get("options", {}))
