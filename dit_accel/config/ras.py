"""`RASConfig`: settings of region-adaptive sampling."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from dit_accel.config.base import Config, check, check_choice, check_fraction, is_int, is_number

SELECTIONS = ("age", "std", "l2norm", "random")
LINEAR_KV_FROM = 20
"""Steps from which extrapolated keys and values were measured to pay (kv_predictor="auto")."""
FEW_UPDATES, RESETS = 10, (0.3, 0.5)
"""resets="auto": RESETS where the tokens of a run get fewer updates than FEW_UPDATES. A dense step also
shortens the intervals that tokens are extrapolated from, which costs more than it brings where updates
are many."""


@dataclass(frozen=True, kw_only=True)
class RASConfig(Config):
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
            # The published code: dense steps 0 to 3, 12 and 20 of 28; 0 to 3, 12 and 22 of 30; none at the end.
            "warmup": 4,
            "tail": 0,
            "resets": (0.4, 0.71),
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
            check_fraction("ratio", self.ratio)
        for name, least in (("warmup", 1), ("tail", 0)):
            steps = getattr(self, name)
            check(
                name,
                steps,
                (is_int(steps) and steps >= least) or (isinstance(steps, float) and 0 < steps <= 1),
                f"an int >= {least} (steps) or a float in (0, 1] (fraction of the steps)",
            )
        if self.resets != "auto":
            check("resets", self.resets, isinstance(self.resets, list | tuple), "'auto' or a list")
            object.__setattr__(self, "resets", tuple(self.resets))
            for x in self.resets:
                ok = (is_int(x) and x >= 0) or (isinstance(x, float) and 0 < x < 1)
                check("resets", x, ok, "step indices >= 0 or fractions in (0, 1)")
        check_choice("selection", self.selection, SELECTIONS)
        check(
            "high_ratio",
            self.high_ratio,
            is_number(self.high_ratio) and 0 <= self.high_ratio <= 1,
            "[0, 1]",
        )
        scale = self.starvation_scale
        ok = is_number(scale) and 0 <= scale < math.inf
        check("starvation_scale", scale, ok, "a finite number >= 0")
        self._check_max_age()
        check_choice("predictor", self.predictor, ("linear", "hold"))
        check_choice("kv_predictor", self.kv_predictor, ("auto", "linear", "hold"))
        check_choice("region", self.region, ("tile", "token"))
        levels = self.n_levels
        check(
            "n_levels",
            levels,
            levels is None or (is_int(levels) and levels >= 1),
            "an int >= 1 or None",
        )
        check_choice("kv_cache", self.kv_cache, ("full", "fp8"))

    def _check_ratios(self) -> None:
        accepted = "a fraction in (0, 1], or [(0, ratio), (start, ratio), ...] with rising starts"
        pairs = self.ratio
        good = bool(pairs) and all(  # type: ignore[arg-type]
            isinstance(x, list | tuple) and len(x) == 2 and all(map(is_number, x)) and 0 <= x[0] < 1
            for x in pairs  # type: ignore[union-attr]
        )
        starts = [x[0] for x in pairs] if good else []  # type: ignore[union-attr]
        good = good and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
        check("ratio", pairs, good, accepted)
        for _, ratio in pairs:  # type: ignore[union-attr]
            check_fraction("ratio", ratio)
        object.__setattr__(self, "ratio", tuple(tuple(x) for x in pairs))  # type: ignore[union-attr]

    def _check_max_age(self) -> None:
        age = self.max_age
        if age is None or age == "auto":
            return
        least = math.ceil(1 / self.lowest_ratio - 1e-9) - 1
        check(
            "max_age",
            age,
            is_int(age) and age >= least,
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
