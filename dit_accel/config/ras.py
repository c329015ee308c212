"""`RASConfig`: settings of region-adaptive sampling."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from dit_accel.config.base import (
    Config,
    check,
    check_choice,
    check_fraction,
    is_int,
    is_number,
    num_steps_of,
)

SELECTIONS = ("error", "age", "std", "l2norm", "random")
PREDICTORS = ("auto", "fitted", "linear", "hold")
BUDGETS = {
    "quality": ((0, 0.85), (15, 0.75), (31, 0.6)),
    "balanced": ((0, 0.75), (15, 0.65), (31, 0.4)),
    "fast": ((0, 0.7), (15, 0.5), (31, 0.3)),
}
"""Budgets of the presets: pairs (smallest number of steps, share of the dense cost)."""
UNDAMPED_FROM = 31
"""Number of steps from which predictor="auto" is "linear" under a budget. Damping the extrapolation makes each forecast
more accurate, but biases all of them in the same direction. In runs of this length, the measured error is larger with damping."""
LINEAR_KV_FROM = 20
"""Number of steps from which kv_predictor="auto" extrapolates keys and values (measured)."""
FEW_UPDATES, RESETS = 10, (0.3, 0.5)
"""resets="auto" uses RESETS if a token gets fewer than FEW_UPDATES updates in a run. With more updates, resets lower the
quality: a dense step shortens the intervals from which tokens are extrapolated."""


@dataclass(frozen=True, kw_only=True)
class RASConfig(Config):
    """Region-adaptive sampling: in some steps the transformer runs on all tokens, in others on some tokens or not at all.

    - `budget` alone: dense steps, and forecast steps, which do not call the transformer.
    - `ratio` alone: dense steps, and partial steps, which run the transformer on some of the tokens.
    - `budget` and `ratio`: a mixture of dense, partial and forecast steps.
    - `control`: each step is dense or a forecast, depending on the predicted error. With `ratio`, a step may also be
      partial, with that share of the tokens or half of it.
    - None of them: the budget of the preset "balanced".
    """

    budget: float | int | tuple | list | None = None
    """Share of the cost of dense sampling that a run may take, in (0, 1]; or a list of (num_steps, share), where a
    share holds for runs of at least num_steps steps (the first is 0). None: no budget."""
    ratio: float | int | tuple | list | None = None
    """Active tokens / all image tokens on a partial step, in (0, 1]; or a list of (start, ratio), where
    start is the fraction of the steps from which that ratio holds (the first is 0). None: no partial steps."""
    control: float | int | None = None
    """Largest predicted error of the predicted tokens of a step, in place of a budget: the relative error of the output
    times |s_(k+1) - s_k| / (1 - s_k), with noise levels s. The cost is then not known before the run."""
    warmup: int | float | Literal["auto"] = "auto"
    """Dense first steps. A float is a fraction of the executed steps (image-to-image executes fewer than requested),
    rounded up, and at least 3 steps. An int is a number of steps, at least 1. "auto" is 0.15 if only `ratio` is given,
    else 3."""
    tail: int | float = 2
    """Dense last steps; a float is a fraction, rounded up."""
    resets: tuple | list | Literal["auto"] = "auto"
    """Dense steps in the middle of a run: fractions of the steps (rounded up) or step indices. "auto" is (0.3, 0.5) if
    only `ratio` is given and steps * ratio is less than 10, else none."""
    selection: Literal["error", "age", "std", "l2norm", "random"] = "error"
    """Choice of the active tokens of a partial step. "error": the largest expected forecast errors, from the last measured
    error of each token and the time since then. "age": the longest time without an update. "std", "l2norm": the lowest
    standard deviation or norm over channels of the change of the latents (the paper). "random": random tokens."""
    high_ratio: float | int = 1.0
    """For "std" and "l2norm": share of the inactive tokens taken from the highest scores, the others
    from the lowest. 1 keeps the lowest scores active, as in the paper."""
    starvation_scale: float | int = 0.1
    """For "std" and "l2norm": a token dropped d times counts as exp(-starvation_scale * d) of its score."""
    max_age: int | Literal["auto"] | None = "auto"
    """Largest number of consecutive steps without an update of a token. "auto" is ceil(1 / ratio) + 1 if only `ratio` is
    given, else None. None: no limit."""
    predictor: Literal["auto", "fitted", "linear", "hold"] = "auto"
    """Prediction of the output of tokens that do not run. "linear": linear extrapolation in sigma, with a factor of at
    most 1. "fitted": the same, damped by a number that is fitted during sampling. "hold": the last output. "auto" is
    "fitted" with a budget or control in runs of fewer than 31 steps, else "linear"."""
    correction: float | int = 0.5
    """Share of the error of earlier forecasts that is added back to an output, in [0, 1]. The error is known once later
    outputs show what the forecasts should have been."""
    kv_predictor: Literal["auto", "linear", "hold"] = "auto"
    """Prediction of the keys and values of inactive tokens, as in `predictor`. "linear" takes twice the memory. "auto" is
    "linear" from 20 steps on if memory allows, else "hold"."""
    region: Literal["tile", "token"] = "tile"
    """Unit of selection: runs of 16, 32 or 64 neighbouring tokens ("tile"), or single tokens."""
    n_levels: int | None = 3
    """Largest number of different active-token counts in a run. None: no limit."""
    kv_cache: Literal["full", "fp8"] = "full"
    """Storage of cached keys and values: in the model's dtype, or in 8 bits."""

    SECTION: ClassVar[str] = "ras"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        **{name: {"budget": budget} for name, budget in BUDGETS.items()},
        # A fixed setting that works with every transformer, also if the default of "balanced" changes.
        "forecast": {"budget": BUDGETS["balanced"]},
        "partial": {"ratio": 0.5},
        # Models of 4 to 8 steps: forecasts extrapolate from two outputs, and nothing corrects the last step.
        "few-step": {"budget": 0.85, "warmup": 2, "tail": 1},
        "paper": {
            "ratio": 0.5,
            "selection": "std",
            # The published code: dense steps 0 to 3, 12 and 20 of 28; 0 to 3, 12 and 22 of 30; none at the end.
            "warmup": 4,
            "tail": 0,
            "resets": (0.4, 0.71),
            "max_age": None,
            "predictor": "hold",
            "correction": 0,
            "kv_predictor": "hold",
            "region": "token",
            "n_levels": None,
        },
    }

    def __post_init__(self) -> None:
        control = self.control
        ok = control is None or (is_number(control) and 0 < control < math.inf)
        check("control", control, ok, "a number > 0")
        if control is not None and self.budget is not None:
            raise ValueError(f"control={control!r}: accepted without budget")
        if control is not None and isinstance(self.ratio, list | tuple):
            raise ValueError(f"ratio={self.ratio!r}: accepted with control is one number")
        if control is None and self.budget is None and self.ratio is None:
            object.__setattr__(self, "budget", BUDGETS["balanced"])
        for name in ("budget", "ratio"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                self._check_pairs(name, value)
            elif value is not None:
                check_fraction(name, value)
        for name, least in (("warmup", 1), ("tail", 0)):
            steps = getattr(self, name)
            if name == "warmup" and steps == "auto":
                continue
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
        check_choice("predictor", self.predictor, PREDICTORS)
        ok = is_number(self.correction) and 0 <= self.correction <= 1
        check("correction", self.correction, ok, "[0, 1]")
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

    def _check_pairs(self, name: str, pairs: tuple | list) -> None:
        steps = name == "budget"
        start = "num_steps" if steps else "start"
        accepted = (
            f"a fraction in (0, 1], or [(0, share), ({start}, share), ...] with rising {start}"
        )

        def is_start(x: Any) -> bool:
            return (is_int(x) if steps else is_number(x) and x < 1) and x >= 0

        good = bool(pairs) and all(
            isinstance(x, list | tuple) and len(x) == 2 and is_start(x[0]) for x in pairs
        )
        starts = [x[0] for x in pairs] if good else []
        good = good and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
        check(name, pairs, good, accepted)
        for _, share in pairs:
            check_fraction(name, share)
        object.__setattr__(self, name, tuple(tuple(x) for x in pairs))

    def _check_max_age(self) -> None:
        age = self.max_age
        if age is None or age == "auto":
            return
        least = 0 if self.lowest_ratio is None else math.ceil(1 / self.lowest_ratio - 1e-9) - 1
        check(
            "max_age",
            age,
            is_int(age) and age >= least,
            f"'auto', None, or an int >= {least} (ratio {self.lowest_ratio} * (max_age + 1) must reach 1)",
        )

    @property
    def has_partial_steps(self) -> bool:
        """True if the run may have partial steps. They need a supported model, and keep keys and values."""
        return self.ratio is not None

    @property
    def _ratio_alone(self) -> bool:
        return self.budget is None and self.control is None

    @property
    def lowest_ratio(self) -> float | None:
        """Smallest ratio of the run; None without partial steps."""
        if self.ratio is None or isinstance(self.ratio, int | float):
            return self.ratio
        return min(ratio for _, ratio in self.ratio)

    def budget_of(self, num_steps: int) -> float | None:
        """Return the share of the dense cost that a run of `num_steps` steps may take; None without a budget."""
        if self.budget is None:
            return None
        if isinstance(self.budget, int | float):
            return float(self.budget)
        return float([share for start, share in self.budget if start <= num_steps][-1])

    def warmup_of(self, num_steps: int) -> int:
        """Return the number of dense first steps in a run of `num_steps` steps."""
        warmup = self.warmup
        if warmup == "auto":
            warmup = 0.15 if self._ratio_alone else 3
        if isinstance(warmup, float):
            return max(3, num_steps_of(warmup, num_steps))
        return warmup

    def resets_of(self, num_steps: int) -> tuple:
        """Return the resets of a run of `num_steps` steps: step indices, or fractions of the steps."""
        if self.resets != "auto":
            return tuple(self.resets)
        ratio = self.lowest_ratio
        if ratio is None or not self._ratio_alone:
            return ()
        return RESETS if num_steps * ratio < FEW_UPDATES else ()

    def why_dense(self, num_steps: int) -> str:
        """Return the reason why all of `num_steps` steps are dense, and a remedy, as text for a message."""
        tail, budget = num_steps_of(self.tail, num_steps), self.budget_of(num_steps)
        text = f"{num_steps} steps, warmup {self.warmup_of(num_steps)}, tail {tail}"
        if resets := self.resets_of(num_steps):
            text += f", resets {list(resets)}"
        if budget is not None:
            text += f", budget {budget:g}"
        few = RASConfig(**self.PRESETS["few-step"])
        left = num_steps - max(
            math.floor(few.budget_of(num_steps) * num_steps + 1e-6),  # type: ignore[operator]
            few.warmup_of(num_steps) + num_steps_of(few.tail, num_steps),
        )
        if left <= 0:
            return f"{text}; nothing can be left out of so few steps"
        return f"{text}; ras='few-step' leaves out {left}"

    def output_predictor(self, num_steps: int) -> str:
        """Return `predictor` for a run of `num_steps` steps, with "auto" resolved."""
        if self.predictor == "auto":
            return "linear" if self._ratio_alone or num_steps >= UNDAMPED_FROM else "fitted"
        return self.predictor

    def linear_kv(self, num_steps: int) -> bool:
        """Return whether keys and values are extrapolated in a run of `num_steps` steps if memory allows."""
        if self.kv_predictor == "auto":
            return num_steps >= LINEAR_KV_FROM
        return self.kv_predictor == "linear"

    @property
    def age_limit(self) -> int | None:
        """`max_age` as a number; None without a limit."""
        if self.max_age != "auto":
            return self.max_age
        if self.lowest_ratio is None or not self._ratio_alone:
            return None
        return math.ceil(1 / self.lowest_ratio - 1e-9) + 1
