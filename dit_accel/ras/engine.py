"""`RegionAdaptiveSampling`: decides in each call which tokens run, and forecasts the output of the others."""

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dit_accel.config import RASConfig
from dit_accel.models import Call, TokenOrder, TokenSelection, joint_index
from dit_accel.ras.compatibility import step_cache_of
from dit_accel.ras.context import ContextState
from dit_accel.ras.control import ErrorControl
from dit_accel.ras.outputs import Outputs
from dit_accel.ras.plan import DENSE_ONLY, RunPlan, compute_dtype, for_rows, make_plan
from dit_accel.ras.predictor import Distance
from dit_accel.ras.records import RunState, StepRecord, summarise
from dit_accel.ras.selection import tile_tokens
from dit_accel.ras.stores import Stores
from dit_accel.ras.summary import RASSummary
from dit_accel.runtime.method import Host, Method
from dit_accel.runtime.returned import Form, sample_of
from dit_accel.runtime.run import Run
from dit_accel.runtime.summary import total

OUTSIDE = "no sampling loop drives this call"
TOO_WRONG = "predicted error above the tolerance"


class RegionAdaptiveSampling(Method, TokenSelection):
    """Region-adaptive sampling of one transformer (arXiv 2502.10389), and its token selection.

    Args:
        config: settings.
    """

    name = "ras"
    keeps_activations = True
    may_answer = True
    selection_rank = 1

    def __init__(self, config: RASConfig) -> None:
        self.config = config
        # Without partial steps only whole outputs are cached, which needs no facts about the model.
        self.uses_attention = self.needs_family = config.has_partial_steps
        self.stores = Stores({}, config)
        self.others: tuple[Method, ...] = ()
        """Other methods on the transformer, which may prefer a token order and a tile size."""
        self.separate_guidance = False
        self.channel_axis = 1
        self.state = RunState()
        self._finish_call()

    @property
    def selection(self) -> TokenSelection | None:  # type: ignore[override]
        return self if self.config.has_partial_steps else None

    def check(self, transformer: nn.Module, others: Collection[Method]) -> None:
        if cache := step_cache_of(transformer):
            raise ValueError(
                f"ras: a step cache of diffusers is on ({cache}), which also skips computations of steps; call "
                "transformer.disable_cache() or remove its hooks first"
            )
        beside = [x.name for x in others if x.uses_attention]
        if beside and self.uses_attention and self.config.kv_cache != "full":
            raise ValueError(
                f"kv_cache={self.config.kv_cache!r}: accepted together with {', '.join(beside)} is 'full'"
            )

    def attach(self, host: Host) -> None:
        self.separate_guidance = host.family.separate_guidance
        self.channel_axis = host.family.channel_axis
        if not self.uses_attention:
            return
        self.others = tuple(x for x in host.methods if x is not self)
        self.stores = Stores(host.layers, self.config)

    def detach(self) -> None:
        self._finish_call()
        self.state = RunState()
        self.stores, self.others = Stores({}, self.config), ()

    def _finish_call(self) -> None:
        self.stores.close()
        self.call: Call = None  # type: ignore[assignment]
        self.context: ContextState = None  # type: ignore[assignment]
        self.index: Tensor | None = None
        self._order: TokenOrder | None = None
        self._per_run: dict[str, Any] = {}
        self._places: Tensor | None = None
        self._flat: Tensor | None = None
        self._distance: Distance | None = None
        """Distance of this call to the last updates of its tokens; None if nothing is cached in this call."""
        self._same: Tensor | None = None
        self._rows: Tensor | None = None
        """Rows that are updated in this call, bool `[R, 1]`; None: all rows."""
        self._record: StepRecord = None  # type: ignore[assignment]

    @property
    def per_run(self) -> dict[str, Any]:
        return self._per_run

    @property
    def per_context(self) -> dict[str, Any]:
        return self.context.extras

    @property
    def plan(self) -> RunPlan | None:
        """Plan of the current or last run."""
        return self.state.plan

    @property
    def steps(self) -> dict[int, StepRecord]:
        """Records of the steps of the current or last run."""
        return self.state.steps

    @property
    def kv_bytes(self) -> int:
        """Largest number of bytes of cached keys and values in the current or last run."""
        return self.state.kv_bytes

    # A call ---------------------------------------------------------------------------------------

    def begin_run(self, run: Run) -> None:
        self.state = run.states[self.name] = RunState()

    def begin_call(self, run: Run, call: Call) -> Any:
        """Decide on which tokens this call runs.

        Returns:
            The forecast, if the transformer is not to run, with the type of the last return value; else None.

        Raises:
            RuntimeError: gradients are on.
            ValueError: the scheduler has no noise levels.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ras: gradients are on, and cached values have no gradients: run under torch.no_grad(), or disable() first"
            )
        self._finish_call()  # after Ctrl-C, the end of the last call may have been skipped
        self.state = run.states[self.name]
        self.call = call
        if run.in_loop:
            return self._begin_in_loop(run, call)
        self._begin_outside(run, call)
        return None

    def _begin_outside(self, run: Run, call: Call) -> None:
        """Run on all tokens and cache nothing, because the step is not known."""
        device = call.hidden_states.device
        self.context = ContextState((), None)
        self._order = self._order_of(call.grid, device)
        if self._order is not None:
            self.index = self._order.gather.expand(call.hidden_states.shape[0], -1)
        self._count(
            run.step,
            OUTSIDE,
            fresh=True,
            tiles=None,
            oldest=torch.zeros((), dtype=torch.long, device=device),
        )

    def _begin_in_loop(self, run: Run, call: Call) -> Any:
        latents, grid = call.hidden_states, call.grid
        rows, tokens = latents.shape[0], math.prod(grid)
        plan = self.state.plan = self._plan_of(run, call)
        self._order, self._per_run = plan.order, plan.extras
        step = run.step
        if plan.schedule.has_partial_steps:
            plan.observe(step, call.noisy_latents, self.config.selection)
        level = None if plan.levels is None else plan.levels[step]
        plan.tile_selection.begin_step(step, plan.metric, level)
        control = plan.control if plan.off is None else None
        if control is not None and level is not None:
            control.begin_step(step, level, dense=plan.tile_selection.tiles is None)

        geometry = (tuple(latents.shape), grid, latents.dtype, latents.device, call.form)
        state: ContextState | None = run.context.states.get(self.name)
        fresh = state is None or state.geometry != geometry or state.epoch != call.epoch
        if state is None or fresh:
            state = run.context.states[self.name] = ContextState(geometry, call.epoch)
        self.context = state

        selection, tiles = plan.tile_selection, plan.tile_selection.tiles
        # Without partial steps, all tokens of a row are updated together.
        shape = (rows, tokens if plan.schedule.has_partial_steps else 1)
        forecast = plan.off is None and tiles is not None and tiles.shape[1] == 0
        if forecast and not fresh and (control is None or not control.any):
            outputs = state.outputs
            if not call.must_run and outputs is not None and level is not None:
                self._count(step, None, fresh, tiles, selection.age.amax(), forecast=True)
                at = self._raster(state.distance(level, shape))
                answer = state.returned.fill(outputs.answer(at, plan.intervals[step]))
                self._end(run)
                return answer
        reason = plan.off
        if reason is None and tiles is None:
            reason = TOO_WRONG if selection.too_wrong else "dense step"
        elif reason is None and fresh:
            reason = "first call of a context"
        elif forecast and control is not None and control.any:
            reason = TOO_WRONG
            assert control.runs is not None
            self._rows = for_rows(control.runs[:, None], rows)
        elif forecast:
            reason = "the call could not be left out"
        if reason is None and tiles is not None:
            every = tile_tokens(tokens, plan.schedule.tile, latents.device)
            chosen = every[tiles].flatten(1)
            if tiles.shape[1] == plan.schedule.num_tiles:
                # The last tile may repeat a token to be complete, which is not needed if all tiles run.
                chosen = chosen[:, :tokens]
            self._places = for_rows(chosen, rows)
            self._flat = _flat(self._places, tokens)
        self.index = self._places
        if plan.order is not None:
            raster = plan.order.gather
            self.index = raster.expand(rows, -1) if self._places is None else raster[self._places]
        self._count(step, reason, fresh, selection.tiles, selection.age.amax())
        if plan.off is None and level is not None:
            self._open(level, shape, run.repeats)
        return None

    def _raster(self, at: Distance) -> Distance:
        """Return distances in raster order, from the order in which tokens run. One distance per row stays the same."""
        order = self._order
        if order is None or at.gap.shape[1] == 1:
            return at
        return Distance(*(order.undo(x) for x in (at.factor, at.same, at.gap)))

    def end_call(self, run: Run, call: Call, output: Any) -> Any:
        """Complete the output and cache it. After the last call, or after a failure, free the caches."""
        if output is None:
            run.forget(self.name)
            self.begin_run(run)
            self._finish_call()
            return None
        completed = None if self._distance is None else self._keep(run, output)
        self._end(run)
        return completed

    def _keep(self, run: Run, output: Any) -> Any:
        """Cache the output. Return the completed and corrected output; None if it is unchanged."""
        assert self._distance is not None
        assert self.plan is not None
        sample, state, plan = sample_of(output), self.context, self.plan
        if sample is None:
            plan.off = f"the transformer returned {type(output).__name__}, not a single tensor"
            return None
        if state.outputs is None:
            grid = self.call.grid if plan.schedule.has_partial_steps else None
            state.outputs = Outputs(
                self.config.output_predictor(plan.schedule.num_steps),
                grid,
                correction=float(self.config.correction),
                channel_axis=self.channel_axis,
            )
        state.returned = Form(output)
        distance, active = self._distance, self._rows
        if self._places is not None:
            assert self.index is not None
            active = torch.zeros(distance.factor.shape, dtype=torch.bool, device=sample.device)
            active.scatter_(1, self.index, True)
        complete, errors = state.outputs.record(
            sample,
            self._raster(distance),
            plan.intervals[run.step],
            active,
            repeats=run.repeats,
            measure=plan.control is not None or plan.tile_selection.wants_errors,
        )
        if errors is not None:
            errors = errors * (errors.shape[1] / sample[0].numel())
        if errors is not None and plan.control is not None:
            self._measure_rows(plan.control, errors[:, 0])
        elif errors is not None:
            self._measure(errors, active)
        return None if complete is sample else state.returned.fill(complete)

    def _measure(self, errors: Float[Tensor, "r n"], active: Bool[Tensor, "r n"] | None) -> None:
        """Give the errors of this call's forecasts to the tile selection."""
        assert self._distance is not None
        assert self.plan is not None
        gap, plan = self._distance.gap, self.plan
        known = torch.ones_like(errors, dtype=torch.bool) if active is None else active
        if self._order is not None:
            errors, known = self._order.apply(errors), self._order.apply(known)
        known = known & (
            gap > 0
        )  # a second call at the same noise level has no forecast to measure
        rates = torch.where(known, errors.double() / gap.double().square().clamp(min=1e-20), 0)
        if not self.separate_guidance:
            rates = _guidance_together(rates, self.call.noisy_latents)
        members = tile_tokens(rates.shape[1], plan.schedule.tile, rates.device)
        plan.tile_selection.measure(rates[:, members].mean(-1), known[:, members].any(-1))

    def _measure_rows(self, control: ErrorControl, errors: Float[Tensor, " r"]) -> None:
        """Give the squared relative errors of this call's forecasts to the error control."""
        assert self._distance is not None
        gap = self._distance.gap[:, 0].double()
        known = gap > 0
        if self._rows is not None:
            known = known & self._rows[:, 0]
        rates = torch.where(known, errors.double() / gap.square().clamp(min=1e-20), 0)
        rates = _guidance_together(rates[:, None], self.call.noisy_latents)[:, 0]
        control.measure(rates, known)

    def _end(self, run: Run) -> None:
        states = [x.states.get(self.name) for x in run.contexts.values()]
        nbytes = sum(x.nbytes for x in states if x is not None)
        self.state.kv_bytes = max(self.state.kv_bytes, nbytes)
        if run.is_last_step:
            run.context.states.pop(self.name, None)
            for context in run.contexts.values():
                if context.step < run.step - 1:  # guidance was switched off
                    context.states.pop(self.name, None)
            if self.plan is not None:
                self.plan.latents = None
                self.plan.extras.clear()
        self._finish_call()

    def weights_changed(self, run: Run) -> None:
        run.forget(self.name)
        state: RunState | None = run.states.get(self.name)
        if state is not None and state.plan is not None:
            state.plan.extras.clear()

    def rows(self, host: Host, run: Run | None) -> RASSummary:
        known = run is None or run.states.get(self.name) is self.state
        return summarise(self.state if known else RunState(), self.config, host)

    def unscheduled(self, run: Run) -> tuple[str, str] | None:
        plan = self.plan
        if plan is None or plan.off != DENSE_ONLY:
            return None
        return DENSE_ONLY, self.config.why_dense(plan.schedule.num_steps)

    def idle(self, run: Run) -> str | None:
        records = run.states[self.name].steps.values()
        if any(x.forecasts or x.active < x.tokens for x in records):
            return None
        if any(not x.dense_calls for x in records):
            return "every token is active in every step"  # ratio=1
        return ", ".join(total(x.dense_calls for x in records))

    def _order_of(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        orders = (x.order(grid, device) for x in self.others)
        return next((x for x in orders if x is not None), None)

    def _tile_of(self, grid: tuple[int, int, int], device: torch.device) -> int | None:
        tiles = (x.tile(grid, device) for x in self.others)
        return next((x for x in tiles if x is not None), None)

    def _plan_of(self, run: Run, call: Call) -> RunPlan:
        known = self.state.plan
        if known is not None and known.fits(run, call):
            return known
        if known is not None:
            run.forget(self.name)  # the caches belong to the former plan
        guidance = bool(getattr(run.pipe, "do_classifier_free_guidance", True))
        device = call.hidden_states.device
        return make_plan(
            self.config,
            run,
            call,
            layers=self.stores.layers,
            tile=self._tile_of(call.grid, device),
            order=self._order_of(call.grid, device),
            contexts=2 if guidance and self.separate_guidance else 1,
            cost=partial(_share, call),
        )

    def _count(
        self,
        step: int,
        reason: str | None,
        fresh: bool,
        tiles: Tensor | None,
        oldest: Tensor,
        *,
        forecast: bool = False,
    ) -> None:
        tokens = math.prod(self.call.grid)
        record = self.state.steps.get(step)
        if record is None:
            record = self.state.steps[step] = StepRecord(
                active=tokens,
                tokens=tokens,
                prompt=self.call.text_length,
                text=self.call.text_length,
                token_flops=self.call.token_flops,
                tiles=tiles,
                oldest=oldest,
            )
        self._record = record
        record.calls += 1
        record.fresh += fresh
        record.forecasts += forecast
        if reason is not None:
            record.dense_calls[reason] += 1
        elif self._places is not None:
            record.active = min(record.active, self._places.shape[1])

    def _open(self, level: Float[Tensor, ""], shape: tuple[int, int], repeats: bool) -> None:
        """Record what this call updates, and point the stores at the caches of this context."""
        assert self.plan is not None
        distance = self._distance = self.context.begin(level, self._places, shape, self._rows)
        self._same = distance.same if repeats else None
        if self.plan.schedule.has_partial_steps:
            self._point_stores("image", shape[1], self._flat, self._damped, self._same)

    @property
    def _damped(self) -> Float[Tensor, "r n"]:
        """Extrapolation factor of keys and values: the same as that of the output."""
        assert self._distance is not None
        outputs, factor = self.context.outputs, self._distance.factor
        if outputs is None or outputs.predictor != "fitted":
            return factor
        return factor * outputs.damping().to(factor.dtype)[:, None]

    def _point_stores(
        self,
        layout: str,
        length: int,
        index: Int[Tensor, " rn"] | None,
        factor: Float[Tensor, "r l"],
        same: Float[Tensor, "r l"] | None,
        text: int | None = 0,
    ) -> None:
        """Point the stores of this layout at the caches of the context, see `Stores.point`."""
        assert self.plan is not None
        latents = self.call.hidden_states
        self.stores.point(
            self.context,
            latents.new_empty(0, dtype=compute_dtype(latents)),
            layout,
            (latents.shape[0], length),
            index,
            factor,
            same,
            linear=self.plan.linear_kv,
            text=text,
            processes=self.call.processes,
        )

    def masks(self, sample: int = 0) -> dict[int, Tensor]:
        """Return the active tokens of one sample, bool `[t, h, w]`, for each partial step of the last run."""
        masks: dict[int, Tensor] = {}
        plan = self.plan
        if plan is None:
            return masks
        for step, record in sorted(self.steps.items()):
            if record.tiles is None or record.active == record.tokens:
                continue
            members = tile_tokens(record.tokens, plan.schedule.tile, record.tiles.device)
            mask = torch.zeros(record.tokens, dtype=torch.bool, device=record.tiles.device)
            places = members[record.tiles[sample]].flatten()
            mask[places if plan.order is None else plan.order.gather[places]] = True
            masks[step] = mask.view(plan.key[1]).cpu()
        return masks

    # TokenSelection -------------------------------------------------------------------------------------------

    def fill(self, x: Float[Tensor, "r n c"]) -> Float[Tensor, "r l c"]:
        """Return the outputs of the active tokens in raster order, 0 for other tokens. `end_call` fills in the forecasts."""
        if self._places is None:
            return x if self._order is None else self._order.undo(x)
        assert self.index is not None
        full = x.new_zeros(x.shape[0], math.prod(self.call.grid), x.shape[2])
        return full.scatter_(1, self.index[..., None].expand(-1, -1, x.shape[2]), x)

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        """Set the positions of the image tokens, and connect the stores of the layout to the caches of the context."""
        tokens = math.prod(self.call.grid)
        if self._distance is not None:
            factor = _placed(self._damped, length, offsets)
            same = None if self._same is None else _placed(self._same, length, offsets)
            flat = None
            if self._places is not None:
                flat = _flat(joint_index(self._places, tokens, length, offsets), length)
            text = offsets[0] if len(set(offsets)) == 1 else None
            self._point_stores(layout, length, flat, factor, same, text)
            self._record.text = length - tokens
        return None if self.index is None else joint_index(self.index, tokens, length, offsets)


def _share(call: Call, share: float) -> float:
    """Return the cost of a call on a share of its image tokens, divided by the cost of a dense call."""
    tokens = math.prod(call.grid)
    return share if call.flops is None else call.flops(round(share * tokens)) / call.flops(tokens)


def _guidance_together(x: Float[Tensor, "r n"], latents: Float[Tensor, "r ..."]) -> Tensor:
    """Give both halves of guidance the sum of their values.

    The halves are one batch with equal latents. This is compared on the device, without waiting for it.
    """
    rows = len(x)
    if rows % 2 or len(latents) != rows:
        return x
    first, second = latents.chunk(2)
    equal = (first == second).flatten(1).all(1)[:, None]
    a, b = x.chunk(2)
    return torch.cat([torch.where(equal, a + b, a), torch.where(equal, a + b, b)])


def _placed(x: Float[Tensor, "r n"], length: int, offsets: list[int]) -> Float[Tensor, "r l"]:
    """Return values of image tokens at their positions in longer sequences, 0 elsewhere."""
    longer = x.new_zeros(x.shape[0], length)
    for row, start in enumerate(offsets):
        longer[row, start : start + x.shape[1]] = x[row]
    return longer


def _flat(index: Int[Tensor, "r n"], length: int) -> Int[Tensor, " rn"]:
    """Return the index into the concatenated rows."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * length).flatten()
