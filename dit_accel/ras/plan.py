"""`RunPlan`: decisions of region-adaptive sampling that are made once for a run."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.config import RASConfig
from dit_accel.models import AttentionLayer, Call, TokenOrder
from dit_accel.ras import memory
from dit_accel.ras.budget import step_intervals, step_weights
from dit_accel.ras.compatibility import noise_of
from dit_accel.ras.control import ErrorControl
from dit_accel.ras.levels import noise_levels
from dit_accel.ras.schedule import Schedule, plan_steps
from dit_accel.ras.selection import tile_tokens, token_scores
from dit_accel.ras.tile_selection import TileSelection
from dit_accel.runtime.run import Run

DENSE_ONLY = "the schedule has dense steps only"
"""Value of `RunPlan.off` if no step is a forecast or partial step."""


@dataclass
class RunPlan:
    """Decisions for all calls of a run. They are made again if its length or geometry changes."""

    schedule: Schedule
    tile_selection: TileSelection
    levels: Float[Tensor, " steps_and_end"] | None
    """Noise levels in [0, 1], see `noise_levels`; None if they are not known."""
    intervals: Float[Tensor, " steps"]
    """Difference of noise levels of each step, see `step_intervals`."""
    key: tuple
    """Number of steps, token grid and device for which the plan was made."""
    order: TokenOrder | None = None
    """Order in which the tokens run; None: raster order. A tile is a range of tokens in this order."""
    control: ErrorControl | None = None
    """Error control of the forecast steps, if there are no partial steps; None: no error control."""
    off: str | None = None
    """Reason why RAS is off for the whole run; None if it is on."""
    linear_kv: bool = False
    """True if cached keys and values are extrapolated."""
    extras: dict[str, Any] = field(default_factory=dict)
    """`TokenSelection.per_run` of the run."""
    latents: Tensor | None = None
    """Latents of the step before, for scores."""
    metric: Float[Tensor, "s m"] | None = None
    """Region metric of each tile, see `token_scores`; None if it is not known yet."""
    observed: int = -1
    """Step of the last call of `observe`."""

    def observe(self, step: int, latents: Float[Tensor, "s c ..."], kind: str) -> None:
        """Compute `metric` from the change of the latents in the last step, after guidance.

        Args:
            step: step of the call.
            latents: noisy latents of the call.
            kind: `RASConfig.selection`. Only "std" and "l2norm" need the metric.
        """
        if kind not in ("std", "l2norm") or step == self.observed:
            return
        latents = for_rows(latents, len(self.tile_selection.age))
        if self.latents is not None:
            cells = _by_token(latents.float() - self.latents.float(), self.grid)
            cell = cells.shape[2]
            scores = token_scores(cells.flatten(2), kind, cell)
            if self.order is not None:
                scores = self.order.apply(scores)
            members = tile_tokens(scores.shape[1], self.schedule.tile, scores.device)
            self.metric = scores[:, members].mean(-1)
        self.latents, self.observed = latents, step

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of image tokens along (t, h, w)."""
        return self.key[1]

    def fits(self, run: Run, call: Call) -> bool:
        """Return whether the plan can be used for a call."""
        rows, chosen_for = call.hidden_states.shape[0], len(self.tile_selection.age)
        return self.key == _key(run, call) and (rows % chosen_for == 0 or chosen_for % rows == 0)


def make_plan(
    config: RASConfig,
    run: Run,
    call: Call,
    *,
    layers: dict[str, AttentionLayer],
    tile: int | None,
    order: TokenOrder | None,
    contexts: int,
    cost: Callable[[float], float],
) -> RunPlan:
    """Return the plan of a run.

    Args:
        config: settings.
        run: state of the sampling loop.
        call: first call of the run, or first call of a new geometry.
        layers: self-attention layers by name, to compute the size of their caches.
        tile: number of tokens that are selected together. None: according to `config.region`.
        order: order in which the tokens run. None: raster order.
        contexts: number of calls in a step; each has its own cache.
        cost: function from the share of tokens that run to the share of a dense call's cost.

    Raises:
        ValueError: the scheduler has no noise levels.
    """
    device, rows, tokens = (
        call.hidden_states.device,
        call.hidden_states.shape[0],
        math.prod(call.grid),
    )
    levels = noise_levels(run)
    if levels is None and run.scheduler is not None:
        raise ValueError(
            f"scheduler: {type(run.scheduler).__name__} has no noise levels (sigmas or alphas_cumprod), and ras "
            "extrapolates over them; accepted are schedulers such as FlowMatchEulerDiscreteScheduler"
        )
    assert run.num_steps is not None
    off = None
    if levels is None:
        off = "the noise levels of this loop are not known (sigmas)"
    elif noise := noise_of(run.scheduler):
        # The noise changes the latents, so that earlier outputs do not predict later ones.
        off = f"the scheduler adds noise in each step ({noise})"
    schedule = plan_steps(
        config,
        run.num_steps,
        tokens,
        tile,
        levels=[0.0] * (run.num_steps + 1) if levels is None else levels.tolist(),
        cost=cost,
    )
    weights = [] if levels is None else step_weights(levels.tolist())
    plan = RunPlan(
        schedule,
        TileSelection(config, schedule, rows, device, weights),
        None if levels is None else levels.to(device),
        torch.tensor(
            [] if levels is None else step_intervals(levels.tolist()),
            dtype=torch.float32,
            device=device,
        ),
        _key(run, call),
        order=order,
        off=off,
    )
    if config.control is not None and levels is not None and not schedule.choices:
        plan.control = ErrorControl(float(config.control), weights, rows, device)
    partial = schedule.has_partial_steps
    if off is not None:
        return plan
    if all(count is None for count in schedule.tiles):
        plan.off = DENSE_ONLY
    elif partial and schedule.num_tiles < 2:
        plan.off = f"{tokens} tokens are not more than a tile of {schedule.tile}"
    elif partial:
        _choose_memory(plan, config, call, layers, contexts)
    return plan


def _key(run: Run, call: Call) -> tuple:
    return run.num_steps, call.grid, call.hidden_states.device


def _choose_memory(
    plan: RunPlan,
    config: RASConfig,
    call: Call,
    layers: dict[str, AttentionLayer],
    contexts: int,
) -> None:
    """Decide whether keys and values are extrapolated, and whether they fit at all."""
    device = call.hidden_states.device
    free, sharing = memory.free_bytes(device), 1
    if (
        call.processes is not None
    ):  # each process caches its own heads; the smallest free memory decides for all
        free, sharing = call.processes.least(free, device), call.processes.size
    cache = memory.plan_cache(
        config,
        plan.schedule.num_steps,
        memory.cached_layers(layers, math.prod(call.grid), call.text_length, sharing),
        rows=call.hidden_states.shape[0],
        contexts=contexts,
        itemsize=compute_dtype(call.hidden_states).itemsize,
        free=free,
    )
    plan.linear_kv = cache.linear_kv
    if cache.fits:
        return
    gib = 2.0**30
    plan.off = "not enough memory for cached keys and values"
    warnings.warn(
        f"ras: off for this run: cached keys and values need {cache.kv_bytes / gib:.2f} GiB in addition to "
        f"{cache.working_bytes / gib:.2f} GiB for a call of the model, and {cache.free_bytes / gib:.2f} GiB "
        f"are free on {device}; kv_cache='fp8' or kv_predictor='hold' need less",
        stacklevel=2,
    )


def for_rows(x: Tensor, rows: int) -> Tensor:
    """Repeat values of samples for all rows of a call, in which the halves of guidance have the same latents."""
    return x.repeat(max(1, rows // len(x)), *[1] * (x.ndim - 1))[:rows]


def _by_token(
    x: Float[Tensor, "s c ..."], grid: tuple[int, int, int]
) -> Float[Tensor, "s n cell c"]:
    """Return the latent positions of each token."""
    if x.ndim == 4:
        x = x[:, :, None]
    for axis, (size, n) in enumerate(zip(x.shape[2:], grid, strict=True)):
        x = x.unflatten(2 + 2 * axis, (n, size // n))  # becomes [S, C, t, pt, h, ph, w, pw]
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)


def compute_dtype(latents: Tensor) -> torch.dtype:
    """Return the dtype of keys: the autocast dtype if autocast is on, else the dtype of the latents."""
    kind = latents.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype
