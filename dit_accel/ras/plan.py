"""`RunPlan`: what region-adaptive sampling decides once for a run."""

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
"""`RunPlan.off` where no step is left to forecast, or to run on some of the tokens."""


@dataclass
class RunPlan:
    """Decisions that the calls of one run share; made again if its length or geometry changes."""

    schedule: Schedule
    tile_selection: TileSelection
    levels: Float[Tensor, " steps_and_end"] | None
    """Noise levels in [0, 1], see `noise_levels`; None: not known."""
    intervals: Float[Tensor, " steps"]
    """Difference of noise levels that each step bridges, see `step_intervals`."""
    key: tuple
    """Length, grid and device that all of this fits."""
    order: TokenOrder | None = None
    """Order in which the tokens run; None: raster. Tiles are runs of tokens in this order."""
    control: ErrorControl | None = None
    """Decides which of the forecast steps of the schedule are dense after all, if there are no partial steps."""
    off: str | None = None
    """Reason why RAS is off for the whole run."""
    linear_kv: bool = False
    extras: dict[str, Any] = field(default_factory=dict)
    latents: Tensor | None = None
    """Those of the step before, for scores."""
    metric: Float[Tensor, "s m"] | None = None
    observed: int = -1
    """Step of the last observation."""

    def observe(self, step: int, latents: Float[Tensor, "s c ..."], kind: str) -> None:
        """Score how the last step changed the latents: the guided update that was really made.

        Args:
            step: of the call.
            latents: noisy latents of the call.
            kind: `RASConfig.selection`. Nothing happens where it needs no scores.
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
        """Image tokens (t, h, w)."""
        return self.key[1]

    def fits(self, run: Run, call: Call) -> bool:
        """Return whether a call of this run, with its rows, can follow this plan."""
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
    """Return the plan of a run, as its first call shows it.

    Args:
        config: settings.
        run: a sampling loop.
        call: its first call, or the first of another geometry.
        layers: self-attention layers, for the memory that their keys and values take.
        tile: tokens that are selected together. None: as `config.region` says.
        order: in which the tokens run. None: raster.
        contexts: calls of a step, each of which has a cache of its own.
        cost: from the share of tokens that run to the share of a dense call's cost.

    Raises:
        ValueError: the noise levels of the scheduler are not known.
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
        # Each step then begins at latents that no earlier output foretells.
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
    if call.processes is not None:  # each keeps its own heads, and all do what the fullest can
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
        f"ras: off for this run: cached keys and values need {cache.kv_bytes / gib:.2f} GiB beside "
        f"{cache.working_bytes / gib:.2f} GiB for the model's own work, {cache.free_bytes / gib:.2f} GiB "
        f"are free on {device}; kv_cache='fp8' or kv_predictor='hold' need less",
        stacklevel=2,
    )


def for_rows(x: Tensor, rows: int) -> Tensor:
    """Repeat what was found for other rows of the same samples: the halves of guidance have the same latents,
    so that a batch of both repeats one of them."""
    return x.repeat(max(1, rows // len(x)), *[1] * (x.ndim - 1))[:rows]


def _by_token(
    x: Float[Tensor, "s c ..."], grid: tuple[int, int, int]
) -> Float[Tensor, "s n cell c"]:
    """The latent positions of each token."""
    if x.ndim == 4:
        x = x[:, :, None]
    for axis, (size, n) in enumerate(zip(x.shape[2:], grid, strict=True)):
        x = x.unflatten(2 + 2 * axis, (n, size // n))  # ends as [S, C, t, pt, h, ph, w, pw]
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)


def compute_dtype(latents: Tensor) -> torch.dtype:
    """Return the dtype of keys: that of autocast, or that of the latents."""
    kind = latents.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype
