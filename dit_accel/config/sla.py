"""`SLAConfig`: settings of sparse-linear attention."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dit_accel.config.base import Config, check, check_choice, check_fraction, is_int, is_number

COMBINES = ("none", "shared_softmax", "proj", "alpha")
LINEAR_SCOPES = ("marginal", "complement", "all")
ROUTERS = ("spread", "mean", "learned")
FEATURE_MAPS = ("softmax", "elu", "relu")
CROSSOVERS = ("auto", "never")
CLIP_TILES = {16: (4, 2, 2), 32: (8, 2, 2), 64: (4, 2, 8), 128: (4, 4, 8)}
IMAGE_TILES = {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}
"""Tile shapes of order="auto", by tokens per block; docs/sla.md has the measurements."""


@dataclass(frozen=True, kw_only=True)
class SLAConfig(Config):
    """Sparse attention in the self-attention layers of a diffusion transformer."""

    topk: int | float | None = 0.25
    """Fraction of the key blocks that each query block reads exactly, in (0, 1]: max(1, ceil(topk * blocks)) blocks.
    Text blocks are read in addition. None: only `top_p` decides."""
    top_p: float | int | None = None
    """Softmax mass in (0, 1]: each query block reads the fewest best blocks whose estimated softmax weights sum to at
    least this. With `topk`, a row reads the union of both. Needs crossover="never", because the number of blocks is not
    known in advance."""
    router: Literal["spread", "mean", "learned"] = "spread"
    """Ranking of key blocks. "mean" (SLA): by the mean key alone. "spread": also by how much the keys of a block
    differ, which adds to its attention. "learned" (SLA2): "spread" with weights that training adapts to the model.
    Untrained, it ranks like "spread"."""
    rounding: Literal["ceil", "floor"] = "ceil"
    """Rounding of topk * blocks. "floor" (at least one block) is for checkpoints that were trained with it."""
    skip: float | int = 0.0
    """Fraction of the blocks, those with the lowest scores, that no branch reads (k_l in the paper). For
    linear_scope="marginal"."""
    block_q: int | str = "auto"
    """Tokens per query block: 16, 32, 64, 128 or "auto". "auto" is 64. On NVIDIA GPUs of compute capability 9.0
    (H100, H200) it is 128 if `block_k` is 64 and `order` is no tile shape, because the second-level cache limits
    query blocks of 64 there."""
    block_k: int = 64
    """Tokens per key block: 16, 32, 64 or 128."""
    combine: Literal["none", "shared_softmax", "proj", "alpha"] = "shared_softmax"
    """Treatment of unread blocks. "none": dropped. "shared_softmax": summarised in the same softmax (training-free).
    "proj" (SLA): read by linear attention, whose output is projected and added. "alpha" (SLA2): read by linear
    attention, whose output is mixed in."""
    linear_scope: Literal["marginal", "complement", "all"] = "complement"
    """Blocks that the linear attention of "proj" and "alpha" reads. "complement": all blocks that are not read exactly.
    "marginal": the complement without the skipped blocks. "all": every block."""
    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    """Feature map of the linear attention."""
    order: str | tuple[int, ...] | list[int] = "auto"
    """Token order: "raster", a tile shape (t, h, w) in latent tokens whose product is `block_q` and `block_k`, or "auto":
    tiles of several frames for clips, square tiles for images."""
    dense_steps: int | float = 0.1
    """First denoising steps that stay dense: a float is a fraction of the steps (rounded up), an int a number of steps."""
    dense_layers: int | tuple[int, ...] | list[int] = 1
    """Layers that stay dense: the first n, or a list of indices (negative ones from the end)."""
    topk_by_layer: dict[Any, float] = field(default_factory=dict)
    """`topk` of single layers, by layer index (negative ones from the end)."""
    crossover: Literal["auto", "never"] = "auto"
    """"auto": dense below the length from which sparse attention was measured to be faster. "never": sparse at every
    length."""

    SECTION: ClassVar[str] = "sla"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "quality": {"topk": 0.4, "dense_steps": 0.2, "dense_layers": 2},
        "balanced": {},
        "fast": {"topk": 0.15, "dense_steps": 0.05},
        # For models of 4 to 8 steps: one dense step would be an eighth to a quarter of the run.
        "few-step": {"dense_steps": 0},
    }

    def __post_init__(self) -> None:
        if self.topk is None and self.top_p is None:
            raise ValueError(
                "topk=None, top_p=None: accepted is a fraction in (0, 1] for one of them"
            )
        for name in ("topk", "top_p"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name))
        check_choice("router", self.router, ROUTERS)
        check_choice("rounding", self.rounding, ("ceil", "floor"))
        skip = self.skip
        check("skip", skip, is_number(skip) and 0 <= skip < 1, "a fraction in [0, 1)")
        blocks = (16, 32, 64, 128)
        q, k = self.block_q, self.block_k
        check("block_k", k, is_int(k) and k in blocks, "16, 32, 64, 128")
        check("block_q", q, q == "auto" or (is_int(q) and q in blocks), "16, 32, 64, 128, 'auto'")
        check_choice("combine", self.combine, COMBINES)
        check_choice("linear_scope", self.linear_scope, LINEAR_SCOPES)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        if skip and not (self.has_linear_branch and self.linear_scope == "marginal"):
            raise ValueError(
                f"skip={skip}: accepted with combine='proj' or 'alpha' and linear_scope='marginal', else 0"
            )
        check_choice("crossover", self.crossover, CROSSOVERS)
        if self.top_p is not None and self.crossover == "auto":
            raise ValueError(
                f"top_p={self.top_p}: accepted with crossover='never'; the number of blocks is not known in advance, "
                "which crossover='auto' needs"
            )
        self._check_order()
        steps = self.dense_steps
        check(
            "dense_steps",
            steps,
            (is_int(steps) and steps >= 0) or (isinstance(steps, float) and 0 <= steps <= 1),
            "an int >= 0 (steps) or a float in [0, 1] (fraction of the steps)",
        )
        layers = self.dense_layers
        if isinstance(layers, list):
            object.__setattr__(self, "dense_layers", tuple(layers))
        check(
            "dense_layers",
            layers,
            (is_int(layers) and layers >= 0)
            or (isinstance(layers, list | tuple) and all(map(is_int, layers))),
            "an int >= 0 (the first n layers) or a list of layer indices",
        )
        check(
            "topk_by_layer",
            self.topk_by_layer,
            isinstance(self.topk_by_layer, dict),
            "{layer: topk}",
        )
        # JSON stores keys as strings, so 3 and "3" are the same layer.
        by_layer = {}
        for layer, topk in self.topk_by_layer.items():
            digits = str(layer).removeprefix("-")
            check("topk_by_layer", layer, digits.isdecimal(), "layer indices as keys")
            check_fraction(f"topk_by_layer[{layer}]", topk)
            check("topk_by_layer", layer, int(layer) not in by_layer, "each layer once")
            by_layer[int(layer)] = topk
        object.__setattr__(self, "topk_by_layer", by_layer)

    def _check_order(self) -> None:
        if isinstance(self.order, list):
            object.__setattr__(self, "order", tuple(self.order))
        if self.order in ("auto", "raster"):
            return
        tile = self.order
        check(
            "order",
            tile,
            isinstance(tile, tuple) and len(tile) == 3 and all(is_int(n) and n >= 1 for n in tile),
            "'auto', 'raster' or a tile shape (t, h, w)",
        )
        tokens = tile[0] * tile[1] * tile[2]  # type: ignore[operator]
        check(
            "order",
            tile,
            tokens == self.query_block() == self.block_k,
            f"a tile shape whose product ({tokens}) is block_q ({self.query_block()}) and block_k ({self.block_k})",
        )

    @property
    def has_linear_branch(self) -> bool:
        """True if linear attention reads blocks that are not read exactly."""
        return self.combine in ("proj", "alpha")

    @property
    def has_weights(self) -> bool:
        """True if sparse layers have trainable weights, which `save_sla` writes."""
        return self.has_linear_branch or self.router == "learned"

    def query_block(self, capability: tuple[int, int] | None = None) -> int:
        """Return the tokens per query block.

        Args:
            capability: compute capability of the NVIDIA GPU, or None for other devices.
        """
        if not isinstance(self.block_q, str):
            return self.block_q
        # With an explicit tile shape, query and key blocks both have the size of the tile.
        wide = capability == (9, 0) and self.block_k == 64 and isinstance(self.order, str)
        return 128 if wide else 64

    def tile_of(
        self, grid: tuple[int, int, int], block: int | None = None
    ) -> tuple[int, int, int] | None:
        """Return the tile shape of the token order, or None for raster order.

        Args:
            grid: number of latent tokens (t, h, w).
            block: tokens per query block. Default: `query_block()`.
        """
        if self.order == "auto":
            return (CLIP_TILES if grid[0] > 1 else IMAGE_TILES)[block or self.query_block()]
        return None if self.order == "raster" else self.order  # type: ignore[return-value]

    def layer_topk(self, layer: int, num_layers: int) -> float | int | None:
        """Return `topk` of a layer, with `topk_by_layer` applied."""
        return self.topk_by_layer.get(layer, self.topk_by_layer.get(layer - num_layers, self.topk))

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError if a setting names a layer that a model of `num_layers` layers does not have."""
        named = () if isinstance(self.dense_layers, int) else self.dense_layers
        by_name = {"dense_layers": tuple(named), "topk_by_layer": tuple(self.topk_by_layer)}
        for name, indices in by_name.items():
            for i in indices:
                check(name, i, -num_layers <= i < num_layers, f"indices of the {num_layers} layers")
        if isinstance(self.dense_layers, int):
            check(
                "dense_layers",
                self.dense_layers,
                self.dense_layers <= num_layers,
                f"at most {num_layers}",
            )

    def is_dense_layer(self, layer: int, num_layers: int) -> bool:
        """Return whether a layer stays dense in every step."""
        if isinstance(self.dense_layers, int):
            return layer < self.dense_layers
        return layer in self.dense_layers or layer - num_layers in self.dense_layers
