"""`SLAConfig` and `RASConfig`: what acceleration does, as frozen, validated records."""

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard

COMBINES = ("none", "shared_softmax", "proj", "alpha")
LINEAR_SCOPES = ("marginal", "complement", "all")
ROUTERS = ("spread", "mean")
FEATURE_MAPS = ("softmax", "elu", "relu")
CROSSOVERS = ("auto", "never")
SELECTIONS = ("age", "std", "l2norm", "random")
SECTIONS = ("ras", "sla")
CLIP_TILES = {16: (4, 2, 2), 32: (8, 2, 2), 64: (4, 2, 8), 128: (4, 4, 8)}
IMAGE_TILES = {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}
"""order="auto", by tokens per block; docs/sla.md tells why."""
LINEAR_KV_FROM = 20
"""Steps from which extrapolated keys and values were measured to pay (kv_predictor="auto")."""
FEW_UPDATES, RESETS = 10, (0.3, 0.5)
"""resets="auto": RESETS where the tokens of a run get fewer updates than FEW_UPDATES. A dense step also
shortens the intervals that tokens are extrapolated from, which costs more than it brings where updates
are many."""


class _Config:
    """Loading and saving, shared by the configs. Each is one section of a YAML file."""

    SECTION: ClassVar[str]
    PRESETS: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def load(cls, source: Any) -> Any:
        """From a config, a dict, a preset name or a YAML file."""
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
                f"{cls.SECTION}={str(source)!r}: no such preset or YAML file{_suggest(str(source), names)}; "
                f"accepted are {', '.join(names)}, a YAML file, an {cls.__name__} or a dict"
            )
        raise ValueError(
            f"{cls.SECTION}={source!r}: accepted are a preset name, a YAML file, an {cls.__name__} or a dict"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """From field names and values; an unknown key is an error with a suggestion."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r}{_suggest(str(key), names)}; accepted are {', '.join(names)}"
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> Any:
        """From the section of a YAML file (`sla:` or `ras:`) that has these very field names."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: not a readable YAML file ({error})") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path}: accepted is a mapping with the section {cls.SECTION}:")
        for key in data:
            if key not in SECTIONS:
                raise ValueError(
                    f"{path}: unknown section {key!r}{_suggest(str(key), list(SECTIONS))}; accepted are ras: and sla:"
                )
        if cls.SECTION not in data:
            raise ValueError(f"{path}: no section {cls.SECTION}:")
        if not isinstance(data[cls.SECTION], dict):
            raise ValueError(f"{path}: the section {cls.SECTION}: must hold keys and values")
        try:
            return cls.from_dict(data[cls.SECTION])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `from_dict` reads them back."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {key: _as_lists(x) for key, x in values.items()}


@dataclass(frozen=True, kw_only=True)
class RASConfig(_Config):
    """Region-adaptive sampling: on most steps the transformer runs on some of the tokens only."""

    ratio: float | int | tuple | list = 0.5
    """Active tokens / all image tokens on a RAS step, in (0, 1]; or a list of (start, ratio), where
    start is the fraction of the steps from which that ratio holds (the first is 0)."""
    warmup: int | float = 0.15
    """Dense first steps. A float is a fraction of the steps really executed, rounded up, and at least
    3 steps; an int is a number of steps, at least 1."""
    tail: int | float = 2
    """Dense last steps; a float is a fraction, rounded up."""
    resets: tuple | list | Literal["auto"] = "auto"
    """Dense steps in between: fractions of the steps (rounded up) or step indices. "auto" is
    (0.3, 0.5) where steps * ratio is less than 10, else none: extrapolation then does better alone."""
    selection: Literal["age", "std", "l2norm", "random"] = "age"
    """Who is active: the tokens longest without an update; those whose latents change with the lowest
    standard deviation or norm over channels (the paper); or a random choice."""
    high_ratio: float | int = 1.0
    """For "std" and "l2norm": share of the inactive tokens taken from the highest scores, the others
    from the lowest. 1 keeps the lowest scores active, as in the paper."""
    starvation_scale: float | int = 0.1
    """For "std" and "l2norm": a token dropped d times counts as exp(-starvation_scale * d) of its score."""
    max_age: int | Literal["auto"] | None = "auto"
    """Steps in a row a token may go without an update; "auto" is ceil(1 / ratio) + 1, None no cap."""
    predictor: Literal["linear", "hold"] = "linear"
    """Output of inactive tokens: extrapolated linearly in sigma (factor capped at 1), or held."""
    kv_predictor: Literal["auto", "linear", "hold"] = "auto"
    """Keys and values of inactive tokens, likewise. "linear" takes twice the memory; "auto" is linear
    from 20 steps on where memory allows."""
    region: Literal["tile", "token"] = "tile"
    """What is selected: runs of 16, 32 or 64 neighbouring tokens, or single tokens."""
    n_levels: int | None = 3
    """At most this many different numbers of active tokens in a run; None: no limit."""
    kv_cache: Literal["full", "fp8"] = "full"
    """How cached keys and values are stored."""

    SECTION: ClassVar[str] = "ras"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quality": {"ratio": 0.5, "warmup": 0.25},
        "balanced": {},
        "fast": {"ratio": 0.25},
        "paper": {
            "selection": "std",
            "tail": 1,
            "resets": (0.43, 0.71),
            "max_age": None,
            "predictor": "hold",
            "kv_predictor": "hold",
            "region": "token",
            "n_levels": None,
        },
    }

    def __post_init__(self) -> None:
        if isinstance(self.ratio, list | tuple):
            self._check_ratios()
        else:
            _check_fraction("ratio", self.ratio)
        for name, least in (("warmup", 1), ("tail", 0)):
            steps = getattr(self, name)
            _check(
                name,
                steps,
                (_is_int(steps) and steps >= least)
                or (isinstance(steps, float) and 0 < steps <= 1),
                f"an int >= {least} (steps) or a float in (0, 1] (fraction of the steps)",
            )
        if self.resets != "auto":
            _check("resets", self.resets, isinstance(self.resets, list | tuple), "'auto' or a list")
            object.__setattr__(self, "resets", tuple(self.resets))
            for x in self.resets:
                ok = (_is_int(x) and x >= 0) or (isinstance(x, float) and 0 < x < 1)
                _check("resets", x, ok, "step indices >= 0 or fractions in (0, 1)")
        _check_choice("selection", self.selection, SELECTIONS)
        _check(
            "high_ratio",
            self.high_ratio,
            _is_number(self.high_ratio) and 0 <= self.high_ratio <= 1,
            "[0, 1]",
        )
        scale = self.starvation_scale
        ok = _is_number(scale) and 0 <= scale < math.inf
        _check("starvation_scale", scale, ok, "a finite number >= 0")
        self._check_max_age()
        _check_choice("predictor", self.predictor, ("linear", "hold"))
        _check_choice("kv_predictor", self.kv_predictor, ("auto", "linear", "hold"))
        _check_choice("region", self.region, ("tile", "token"))
        levels = self.n_levels
        _check(
            "n_levels",
            levels,
            levels is None or (_is_int(levels) and levels >= 1),
            "an int >= 1 or None",
        )
        _check_choice("kv_cache", self.kv_cache, ("full", "fp8"))

    def _check_ratios(self) -> None:
        accepted = "a fraction in (0, 1], or [(0, ratio), (start, ratio), ...] with rising starts"
        pairs = self.ratio
        good = bool(pairs) and all(  # type: ignore[arg-type]
            isinstance(x, list | tuple)
            and len(x) == 2
            and all(map(_is_number, x))
            and 0 <= x[0] < 1
            for x in pairs  # type: ignore[union-attr]
        )
        starts = [x[0] for x in pairs] if good else []  # type: ignore[union-attr]
        good = good and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
        _check("ratio", pairs, good, accepted)
        for _, ratio in pairs:  # type: ignore[union-attr]
            _check_fraction("ratio", ratio)
        object.__setattr__(self, "ratio", tuple(tuple(x) for x in pairs))  # type: ignore[union-attr]

    def _check_max_age(self) -> None:
        age = self.max_age
        if age is None or age == "auto":
            return
        least = math.ceil(1 / self.lowest_ratio - 1e-9) - 1
        _check(
            "max_age",
            age,
            _is_int(age) and age >= least,
            f"'auto', None, or an int >= {least} (ratio {self.lowest_ratio} * (max_age + 1) must reach 1)",
        )

    @property
    def lowest_ratio(self) -> float:
        """The smallest ratio of the run."""
        if isinstance(self.ratio, int | float):
            return self.ratio
        return min(ratio for _, ratio in self.ratio)

    def resets_of(self, num_steps: int) -> tuple:
        """The resets in a run of so many steps, as they are given."""
        if self.resets == "auto":
            return RESETS if num_steps * self.lowest_ratio < FEW_UPDATES else ()
        return tuple(self.resets)

    def linear_kv(self, num_steps: int) -> bool:
        """Whether keys and values are extrapolated in a run of so many steps, memory permitting."""
        if self.kv_predictor == "auto":
            return num_steps >= LINEAR_KV_FROM
        return self.kv_predictor == "linear"

    @property
    def age_limit(self) -> int | None:
        """`max_age` as a number; None without a cap."""
        if self.max_age == "auto":
            return math.ceil(1 / self.lowest_ratio - 1e-9) + 1
        return self.max_age


@dataclass(frozen=True, kw_only=True)
class SLAConfig(_Config):
    """Sparse attention in the self-attention layers of a diffusion transformer."""

    topk: int | float | None = 0.25
    """Fraction of key blocks each query block reads exactly, in (0, 1]: max(1, ceil(topk * blocks)).
    Text blocks come in addition. None: `top_p` alone decides."""
    top_p: float | int | None = None
    """Read the fewest best blocks whose estimated softmax weights sum to this, in (0, 1]; with `topk`
    the union of both. Only with crossover="never": how much it reads is not known in advance."""
    router: Literal["spread", "mean"] = "spread"
    """How key blocks are ranked: by their mean key alone ("mean", SLA), or with what the spread of keys inside
    a block adds to its attention."""
    rounding: Literal["ceil", "floor"] = "ceil"
    """Of topk * blocks; "floor" (at least one block) for checkpoints that were trained so."""
    skip: float | int = 0.0
    """Fraction of the lowest blocks that nothing reads (k_l in the paper), for linear_scope="marginal"."""
    block_q: int = 64
    """Tokens per query block: 16, 32, 64 or 128."""
    block_k: int = 64
    """Tokens per key block: 16, 32, 64 or 128."""
    combine: Literal["none", "shared_softmax", "proj", "alpha"] = "shared_softmax"
    """What happens to unread blocks: dropped; summarised in the same softmax (training-free); or read by
    linear attention, whose output is projected and added ("proj", SLA) or mixed in ("alpha", SLA2)."""
    linear_scope: Literal["marginal", "complement", "all"] = "complement"
    """What the linear attention of "proj" and "alpha" reads: all blocks that are not read exactly, those
    without the skipped ones ("marginal"), or every block."""
    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    """Of the linear attention."""
    order: str | tuple[int, ...] | list[int] = "auto"
    """Token order: "raster", a tile shape (t, h, w) in latent tokens whose product is the block, or "auto":
    tiles of some frames on clips, square tiles on images."""
    dense_steps: int | float = 0.1
    """First denoising steps that stay dense: a fraction of the steps (rounded up) or a number."""
    dense_layers: int | tuple[int, ...] | list[int] = 1
    """Layers that stay dense: the first n, or a list of indices (negative ones from the end)."""
    topk_by_layer: dict[Any, float] = field(default_factory=dict)
    """Overrides of `topk` for single layers."""
    crossover: Literal["auto", "never"] = "auto"
    """"auto": dense below the length measured to pay off; "never": sparse at every length."""

    SECTION: ClassVar[str] = "sla"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quality": {"topk": 0.4, "dense_steps": 0.2, "dense_layers": 2},
        "balanced": {},
        "fast": {"topk": 0.15, "dense_steps": 0.05},
    }

    def __post_init__(self) -> None:
        if self.topk is None and self.top_p is None:
            raise ValueError(
                "topk=None, top_p=None: accepted is a fraction in (0, 1] for one of them"
            )
        for name in ("topk", "top_p"):
            if getattr(self, name) is not None:
                _check_fraction(name, getattr(self, name))
        _check_choice("router", self.router, ROUTERS)
        _check_choice("rounding", self.rounding, ("ceil", "floor"))
        skip = self.skip
        _check("skip", skip, _is_number(skip) and 0 <= skip < 1, "a fraction in [0, 1)")
        for name in ("block_q", "block_k"):
            block = getattr(self, name)
            _check(name, block, _is_int(block) and block in (16, 32, 64, 128), "16, 32, 64, 128")
        _check_choice("combine", self.combine, COMBINES)
        _check_choice("linear_scope", self.linear_scope, LINEAR_SCOPES)
        _check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        if skip and not (self.has_weights and self.linear_scope == "marginal"):
            raise ValueError(
                f"skip={skip}: accepted with combine='proj' or 'alpha' and linear_scope='marginal', else 0"
            )
        _check_choice("crossover", self.crossover, CROSSOVERS)
        if self.top_p is not None and self.crossover == "auto":
            raise ValueError(
                f"top_p={self.top_p}: how much it reads is not known in advance, so that crossover='auto' cannot tell "
                "whether that pays; accepted with crossover='never'"
            )
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
        if self.order in ("auto", "raster"):
            return
        tile = self.order
        _check(
            "order",
            tile,
            isinstance(tile, tuple) and len(tile) == 3 and all(_is_int(n) and n >= 1 for n in tile),
            "'auto', 'raster' or a tile shape (t, h, w)",
        )
        tokens = tile[0] * tile[1] * tile[2]  # type: ignore[operator]
        _check(
            "order",
            tile,
            tokens == self.block_q == self.block_k,
            f"a tile shape whose product ({tokens}) is block_q ({self.block_q}) and block_k ({self.block_k})",
        )

    @property
    def has_weights(self) -> bool:
        """Whether each layer has weights of its own, which `save_sla` writes."""
        return self.combine in ("proj", "alpha")

    def tile_of(self, grid: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """The tile shape on a grid of tokens (t, h, w); None: raster."""
        if self.order == "auto":
            return (CLIP_TILES if grid[0] > 1 else IMAGE_TILES)[self.block_q]
        return None if self.order == "raster" else self.order  # type: ignore[return-value]

    def layer_topk(self, layer: int, num_layers: int) -> float | int | None:
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


def num_steps_of(value: int | float, num_steps: int) -> int:
    """A number of steps: an int is one, a float a fraction of `num_steps`, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * num_steps - 1e-9)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_lists(value: Any) -> Any:
    return [_as_lists(x) for x in value] if isinstance(value, tuple) else value


def _check(name: str, value: Any, ok: bool, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: accepted: {accepted}")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    _check(name, value, value in choices, " or ".join(map(repr, choices)))


def _check_fraction(name: str, value: Any) -> None:
    _check(name, value, _is_number(value) and 0 < value <= 1, "a fraction in (0, 1]")


def _suggest(word: str, accepted: list[str]) -> str:
    close = difflib.get_close_matches(word, accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
