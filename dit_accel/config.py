"""`SLAConfig`: what sparse attention does, as one frozen, validated record."""

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard

COMBINES = ("none", "shared_softmax")
CROSSOVERS = ("auto", "never")


@dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """Sparse attention in the self-attention layers of a diffusion transformer."""

    topk: int | float = 0.25
    """Fraction of key blocks each query block reads exactly, in (0, 1]: max(1, ceil(topk * blocks))."""
    block_q: int = 64
    """Tokens per query block: 16, 32, 64 or 128."""
    block_k: int = 64
    """Tokens per key block: 16, 32, 64 or 128."""
    combine: Literal["none", "shared_softmax"] = "shared_softmax"
    """What happens to unread blocks: dropped, or summarised in the same softmax (training-free)."""
    order: str | tuple[int, ...] | list[int] = "raster"
    """Token order: "raster", or a tile shape (t, h, w) in latent tokens whose product is the block."""
    dense_steps: int | float = 0.1
    """First denoising steps that stay dense: a fraction of the steps (rounded up) or a number."""
    dense_layers: int | tuple[int, ...] | list[int] = 1
    """Layers that stay dense: the first n, or a list of indices (negative ones from the end)."""
    topk_by_layer: dict[Any, float] = field(default_factory=dict)
    """Overrides of `topk` for single layers."""
    crossover: Literal["auto", "never"] = "auto"
    """"auto": dense below the length measured to pay off; "never": sparse at every length."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quality": {"topk": 0.4, "dense_steps": 0.2, "dense_layers": 2},
        "balanced": {},
        "fast": {"topk": 0.15, "dense_steps": 0.05},
    }

    def __post_init__(self) -> None:
        _check_fraction("topk", self.topk)
        for name in ("block_q", "block_k"):
            block = getattr(self, name)
            _check(name, block, _is_int(block) and block in (16, 32, 64, 128), "16, 32, 64, 128")
        _check("combine", self.combine, self.combine in COMBINES, " or ".join(map(repr, COMBINES)))
        _check("crossover", self.crossover, self.crossover in CROSSOVERS, "'auto' or 'never'")
        self._check_order()
        steps = self.dense_steps
        _check(
            "dense_steps",
            steps,
            (_is_int(steps) and steps >= 0) or (isinstance(steps, float) and 0 <= steps <= 1),
            "an int >= 0 (steps) or a float in [0, 1] (fraction of the steps)",
        )
        layers = self.dense_layers
        if isinstance(layers, list):
            object.__setattr__(self, "dense_layers", tuple(layers))
        _check(
            "dense_layers",
            layers,
            (_is_int(layers) and layers >= 0)
            or (isinstance(layers, list | tuple) and all(map(_is_int, layers))),
            "an int >= 0 (the first n layers) or a list of layer indices",
        )
        _check(
            "topk_by_layer",
            self.topk_by_layer,
            isinstance(self.topk_by_layer, dict),
            "{layer: topk}",
        )
        # JSON has string keys only; 3 and "3" mean the same layer.
        by_layer = {}
        for layer, topk in self.topk_by_layer.items():
            digits = str(layer).removeprefix("-")
            _check("topk_by_layer", layer, digits.isdecimal(), "layer indices as keys")
            _check_fraction(f"topk_by_layer[{layer}]", topk)
            by_layer[int(layer)] = topk
        object.__setattr__(self, "topk_by_layer", by_layer)

    def _check_order(self) -> None:
        if isinstance(self.order, list):
            object.__setattr__(self, "order", tuple(self.order))
        if self.order == "raster":
            return
        tile = self.order
        _check(
            "order",
            tile,
            isinstance(tile, tuple) and len(tile) == 3 and all(_is_int(n) and n >= 1 for n in tile),
            "'raster' or a tile shape (t, h, w)",
        )
        tokens = tile[0] * tile[1] * tile[2]  # type: ignore[operator]
        _check(
            "order",
            tile,
            tokens == self.block_q == self.block_k,
            f"a tile shape whose product ({tokens}) is block_q ({self.block_q}) and block_k ({self.block_k})",
        )

    @classmethod
    def load(cls, source: "SLAConfig | dict[str, Any] | str | os.PathLike") -> "SLAConfig":
        """From a config, a dict, a preset name ("quality", "balanced", "fast"), or a YAML file."""
        if isinstance(source, cls):
            return source
        if isinstance(source, dict):
            return cls.from_dict(source)
        if isinstance(source, str) and source in cls.PRESETS:
            return cls(**cls.PRESETS[source])
        if isinstance(source, str | os.PathLike):
            if Path(source).is_file():
                return cls.from_yaml(source)
            names = list(cls.PRESETS)
            raise ValueError(
                f"sla={str(source)!r}: no such preset or YAML file{_suggest(str(source), names)}; "
                f"accepted are {', '.join(names)}, a YAML file, an SLAConfig or a dict"
            )
        raise ValueError(
            f"sla={source!r}: accepted are a preset name, a YAML file, an SLAConfig or a dict"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SLAConfig":
        """From field names and values; an unknown key is an error with a suggestion."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r}{_suggest(str(key), names)}; accepted are {', '.join(names)}"
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> "SLAConfig":
        """From a YAML file with an `sla:` section that has these very field names."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: not a readable YAML file ({error})") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path}: accepted is a mapping with the section sla:")
        for key in data:
            if key != "sla":
                raise ValueError(
                    f"{path}: unknown section {key!r}{_suggest(str(key), ['sla'])}; accepted is sla:"
                )
        if not isinstance(data.get("sla"), dict):
            raise ValueError(f"{path}: the section sla: must hold keys and values")
        try:
            return cls.from_dict(data["sla"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}

    def layer_topk(self, layer: int, num_layers: int) -> float:
        """`topk` of one layer, overrides applied."""
        return self.topk_by_layer.get(layer, self.topk_by_layer.get(layer - num_layers, self.topk))

    def check_layers(self, num_layers: int) -> None:
        """Refuse layer indices that a model of `num_layers` layers does not have."""
        named = () if isinstance(self.dense_layers, int) else self.dense_layers
        by_name = {"dense_layers": tuple(named), "topk_by_layer": tuple(self.topk_by_layer)}
        for name, indices in by_name.items():
            for i in indices:
                _check(
                    name, i, -num_layers <= i < num_layers, f"indices of the {num_layers} layers"
                )
        if isinstance(self.dense_layers, int):
            _check(
                "dense_layers",
                self.dense_layers,
                self.dense_layers <= num_layers,
                f"at most {num_layers}",
            )

    def is_dense_layer(self, layer: int, num_layers: int) -> bool:
        """Whether this layer always stays dense."""
        if isinstance(self.dense_layers, int):
            return layer < self.dense_layers
        return layer in self.dense_layers or layer - num_layers in self.dense_layers


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: Any, ok: bool, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: accepted: {accepted}")


def _check_fraction(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _check(name, value, number and 0 < value <= 1, "a fraction in (0, 1]")


def _suggest(word: str, accepted: list[str]) -> str:
    close = difflib.get_close_matches(word, accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
