"""Rows of the quality benchmarks of sparse attention: the settings that they compare."""

from dataclasses import dataclass
from typing import Any

from dit_accel.config.sla import CLIP_TILES, IMAGE_TILES

DENSITIES = (0.5, 0.25, 0.125, 0.05)
TILES = {
    "video": {block: CLIP_TILES[block] for block in (16, 32, 64)},
    "still": {block: IMAGE_TILES[block] for block in (16, 32, 64)},
}
RANDOM = "random plan"


@dataclass(frozen=True)
class Row:
    """Settings of sparse attention of one row."""

    density: float
    """Requested fraction of key blocks that is read."""
    combine: str
    block: int = 32
    order: str = "tiles"
    router: str = "top-k"
    ranked_by: str = "mean"
    """Value of `SLAConfig.router`."""

    @property
    def key(self) -> str:
        spread = " spread" if self.ranked_by == "spread" else ""
        return f"{self.density} {self.combine} {self.block} {self.order} {self.router}{spread}"

    def sla(self, kind: str, top_p: float | None) -> dict[str, Any]:
        """Return the arguments of `SLAConfig`; dense steps and layers keep their defaults."""
        rule = {"topk": self.density} if self.router != "top-p" else {"topk": None, "top_p": top_p}
        return {
            **rule,
            "router": self.ranked_by,
            "combine": self.combine,
            "block_q": self.block,
            "block_k": self.block,
            "order": "raster" if self.order == "raster" else TILES[kind][self.block],
            "crossover": "never",
        }


def sampled_rows() -> list[Row]:
    """Return the rows for whole sampling runs: each density, and further settings at density 0.25."""
    rows = [Row(d, combine) for d in DENSITIES for combine in ("none", "shared_softmax")]
    at: dict[str, Any] = {"density": 0.25, "combine": "shared_softmax"}
    rows += [Row(**at, router=RANDOM), Row(**at, router="top-p"), Row(**at, order="raster")]
    rows += [Row(**at, block=16), Row(**at, block=64), Row(**at, block=64, order="raster")]
    rows += [Row(d, "shared_softmax", ranked_by="spread") for d in (0.25, 0.125)]
    return [*rows, Row(**at, block=64, ranked_by="spread")]


def attention_rows() -> list[Row]:
    """Return the rows for attention outputs: all combinations of settings."""
    return [
        Row(density, combine, block, order, router, ranked_by)
        for block in (16, 32, 64)
        for order in ("tiles", "raster")
        for router, ranked_by in (
            ("top-k", "mean"),
            ("top-k", "spread"),
            ("top-p", "mean"),
            (RANDOM, "mean"),
        )
        for density in DENSITIES
        for combine in ("none", "shared_softmax")
    ]


def name_of(row: dict[str, Any]) -> str:
    """Return a name for the selection of blocks, with the setting `router` if blocks are ranked."""
    return row["router"] if row["router"] == RANDOM else f"{row['router']}, {row['ranked_by']}"
