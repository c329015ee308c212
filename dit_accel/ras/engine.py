"""`RegionAdaptiveSampling`: decides per call which tokens run, and completes what did not."""

import math
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dit_accel.config import RASConfig
from dit_accel.kernels import LinearState
from dit_accel.models import AttentionLayer, Call, Focus, TokenOrder, joint_index
from dit_accel.ras import memory
from dit_accel.ras.ages import Selection
from dit_accel.ras.compatibility import noise_of, step_cache_of
from dit_accel.ras.context import ContextState
from dit_accel.ras.history import History, KVStore
from dit_accel.ras.schedule import Schedule, plan_steps
from dit_accel.ras.selection import tile_tokens, token_scores
from dit_accel.ras.summary import RASSummary, StepSummary
from dit_accel.runtime.method import Host, Method
from dit_accel.runtime.run import Run
from dit_accel.runtime.summary import reasons, total

OUTSIDE = "no sampling loop drives this call"


@dataclass
class StepRecord:
    """What one step of a run did."""

    active: int
    """Image tokens that ran, the least over its calls."""
    tokens: int
    prompt: int
    """Text tokens of a call, with padding."""
    text: int
    """Those that the layers see."""
    tiles: Tensor | None
    """Active tiles `[S, count]`; None on a dense step."""
    oldest: Tensor
    """Largest age after the step, in steps."""
    calls: int = 0
    fresh: int = 0
    """Calls that computed what is kept for their context."""
    dense_calls: Counter[str] = field(default_factory=Counter)
    """Dense calls, by reason."""


@dataclass
class RunPlan:
    """What the calls of one run share; made again if its length or geometry changes."""

    schedule: Schedule
    selection: Selection
    sigmas: Float[Tensor, " steps"] | None
    key: tuple
    """Length, grid and device that all of this fits."""
    order: TokenOrder | None = None
    """In which the tokens run; None: raster. Tiles are runs of tokens in this order."""
    off: str | None = None
    """Why RAS is off for the whole run."""
    linear_kv: bool = False
    extras: dict[str, Any] = field(default_factory=dict)
    latents: Tensor | None = None
    """Those of the step before, for scores."""
    metric: Float[Tensor, "s m"] | None = None
    observed: int = -1
    """Step of the last observation."""


@dataclass
class RunState:
    """What is kept for one run."""

    steps: dict[int, StepRecord] = field(default_factory=dict)
    plan: RunPlan | None = None
    """None before the first call, and outside of sampling loops."""
    kv_bytes: int = 0
    """Most that cached keys and values have taken, all contexts together."""


class RegionAdaptiveSampling(Method, Focus):
    """RAS of one transformer (arXiv 2502.10389); what the hooks of a family see as `Focus`.

    Args:
        config: settings.
    """

    name = "ras"
    uses_attention = True
    keeps_activations = True
    focus_rank = 1

    def __init__(self, config: RASConfig) -> None:
        self.config = config
        self.layers: dict[str, AttentionLayer] = {}
        self.stores: dict[str, KVStore] = {}
        self.others: tuple[Method, ...] = ()
        """The other methods on the transformer, whose token order and tiles are followed."""
        self.separate_guidance = False
        self.state = RunState()
        self._finish_call()

    @property
    def focus(self) -> Focus:  # type: ignore[override]
        return self

    def check(self, transformer: nn.Module, others: Collection[Method]) -> None:
        if cache := step_cache_of(transformer):
            raise ValueError(
                f"ras: a step cache of diffusers is on ({cache}), and both decide what a step computes; call "
                "transformer.disable_cache() or remove its hooks first"
            )
        beside = [x.name for x in others if x.uses_attention]
        if beside and self.config.kv_cache != "full":
            raise ValueError(
                f"kv_cache={self.config.kv_cache!r}: accepted together with {', '.join(beside)} is 'full'"
            )

    def attach(self, host: Host) -> None:
        self.layers = host.layers
        self.others = tuple(x for x in host.methods if x is not self)
        self.separate_guidance = host.family.separate_guidance
        self.stores = {name: KVStore() for name in host.layers}
        for name, layer in host.layers.items():
            layer.module.processor.kv_store = self.stores[name]

    def detach(self) -> None:
        self._finish_call()
        self.state = RunState()
        self.layers, self.stores, self.others = {}, {}, ()

    def _finish_call(self) -> None:
        for store in self.stores.values():
            store.close()
        self.call: Call = None  # type: ignore[assignment]
        self.context: ContextState = None  # type: ignore[assignment]
        self.index: Tensor | None = None
        self._order: TokenOrder | None = None
        self._per_run: dict[str, Any] = {}
        self._places: Tensor | None = None
        self._flat: Tensor | None = None
        self._factor: Tensor | None = None
        self._same: Tensor | None = None
        self._record: StepRecord = None  # type: ignore[assignment]

    @property
    def per_run(self) -> dict[str, Any]:
        return self._per_run

    @property
    def per_context(self) -> dict[str, Any]:
        return self.context.extras

    @property
    def plan(self) -> RunPlan | None:
        """That of the current or last run."""
        return self.state.plan

    @property
    def steps(self) -> dict[int, StepRecord]:
        """What the steps of the current or last run did."""
        return self.state.steps

    @property
    def kv_bytes(self) -> int:
        """Most that cached keys and values took in the current or last run."""
        return self.state.kv_bytes

    # A call ---------------------------------------------------------------------------------------

    def begin_run(self, run: Run) -> None:
        self.state = run.states[self.name] = RunState()

    def begin_call(self, run: Run, call: Call) -> None:
        """Decide what this call runs on.

        Raises:
            RuntimeError: gradients are on.
            ValueError: the scheduler has no noise levels.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ras: gradients are on, and cached tokens have none: run under torch.no_grad(), or disable() first"
            )
        self._finish_call()  # Ctrl-C in the middle of a call skips the hook that ends it
        self.state = run.states[self.name]
        self.call = call
        if run.in_loop:
            self._begin_in_loop(run, call)
        else:
            self._begin_outside(run, call)

    def _begin_outside(self, run: Run, call: Call) -> None:
        """All tokens, and nothing is kept: which step this is cannot be known."""
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

    def _begin_in_loop(self, run: Run, call: Call) -> None:
        latents, grid = call.hidden_states, call.grid
        rows, tokens = latents.shape[0], math.prod(grid)
        plan = self.state.plan = self._plan_of(run, call)
        self._order, self._per_run = plan.order, plan.extras
        step = run.step
        self._observe(plan, step, call.noisy_latents, grid)
        plan.selection.begin_step(step, plan.metric)

        geometry = (rows, grid, latents.dtype, latents.device)
        state: ContextState | None = run.context.states.get(self.name)
        fresh = state is None or state.geometry != geometry or state.epoch != call.epoch
        if state is None or fresh:
            state = run.context.states[self.name] = ContextState(geometry, call.epoch)
        self.context = state

        tiles = plan.selection.tiles
        reason = plan.off
        if reason is None and tiles is None:
            reason = "dense step"
        elif reason is None and fresh:
            reason = "first call of a context"
        if reason is None and tiles is not None:
            every = tile_tokens(tokens, plan.schedule.tile, latents.device)
            chosen = every[tiles].flatten(1)
            if tiles.shape[1] == plan.schedule.num_tiles:
                # A short last tile repeats a token, which no step on all tokens needs.
                chosen = chosen[:, :tokens]
            self._places = _for_rows(chosen, rows)
            self._flat = _flat(self._places, tokens)
        self.index = self._places
        if plan.order is not None:
            raster = plan.order.gather
            self.index = raster.expand(rows, -1) if self._places is None else raster[self._places]
        selection = plan.selection
        self._count(step, reason, fresh, selection.tiles, selection.age.amax())
        if plan.off is None and plan.sigmas is not None:
            self._open(plan.sigmas[step], (rows, tokens), run.repeats)

    def end_call(self, run: Run, call: Call, output: Any) -> None:
        """Forget what belongs to this call; after the last one, or a failure, give memory back."""
        if output is None:
            run.forget(self.name)
            self.begin_run(run)
        else:
            states = [x.states.get(self.name) for x in run.contexts.values()]
            nbytes = sum(x.nbytes for x in states if x is not None)
            self.state.kv_bytes = max(self.state.kv_bytes, nbytes)
            if run.is_last_step:
                run.context.states.pop(self.name, None)
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
        return summarise(self, host)

    def idle(self, run: Run) -> str | None:
        records = run.states[self.name].steps.values()
        if any(x.active < x.tokens for x in records):
            return None
        return reasons(total(x.dense_calls for x in records))

    def _order_of(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        orders = (x.order(grid, device) for x in self.others)
        return next((x for x in orders if x is not None), None)

    def _tile_of(self, grid: tuple[int, int, int], device: torch.device) -> int | None:
        tiles = (x.tile(grid, device) for x in self.others)
        return next((x for x in tiles if x is not None), None)

    def _plan_of(self, run: Run, call: Call) -> RunPlan:
        grid, device = call.grid, call.hidden_states.device
        rows, steps = call.hidden_states.shape[0], run.num_steps
        assert steps is not None
        key, known = (steps, grid, device), self.state.plan
        if known is not None:
            chosen_for = len(known.selection.age)
            if known.key == key and (rows % chosen_for == 0 or chosen_for % rows == 0):
                return known
            run.forget(self.name)  # what was cached fits another plan
        tokens = math.prod(grid)
        sigmas = run.sigmas()
        if sigmas is None and run.scheduler is not None:
            raise ValueError(
                f"scheduler: {type(run.scheduler).__name__} has no sigmas; accepted with ras are schedulers with "
                "noise levels, such as FlowMatchEulerDiscreteScheduler"
            )
        schedule = plan_steps(self.config, steps, tokens, self._tile_of(grid, device))
        plan = RunPlan(
            schedule,
            Selection(self.config, schedule, rows, device),
            None if sigmas is None else sigmas.to(device=device, dtype=torch.float32),
            key,
            order=self._order_of(grid, device),
        )
        if sigmas is None:
            plan.off = "the noise levels of this loop are not known (sigmas)"
        elif noise := noise_of(run.scheduler):
            # Each step then begins at latents that no earlier output foretells.
            plan.off = f"the scheduler adds noise in each step ({noise})"
        elif schedule.num_tiles < 2:
            plan.off = f"{tokens} tokens are not more than a tile of {schedule.tile}"
        elif all(count is None for count in schedule.tiles):
            plan.off = "the schedule has dense steps only"
        else:
            guidance = bool(getattr(run.pipe, "do_classifier_free_guidance", True))
            contexts = 2 if guidance and self.separate_guidance else 1
            self._choose_memory(plan, call, tokens, rows, contexts)
        return plan

    def _choose_memory(
        self, plan: RunPlan, call: Call, tokens: int, rows: int, contexts: int
    ) -> None:
        """Whether keys and values are extrapolated, and whether they fit at all."""
        device = call.hidden_states.device
        cache = memory.plan_cache(
            self.config,
            plan.schedule.num_steps,
            memory.cached_layers(self.layers, tokens, call.text_length),
            rows=rows,
            contexts=contexts,
            itemsize=_compute_dtype(call.hidden_states).itemsize,
            free=memory.free_bytes(device),
        )
        plan.linear_kv = cache.linear_kv
        if not cache.fits:
            gib = 2.0**30
            plan.off = "not enough memory for cached keys and values"
            warnings.warn(
                f"ras: off for this run: cached keys and values need {cache.kv_bytes / gib:.2f} GiB beside "
                f"{cache.working_bytes / gib:.2f} GiB for the model's own work, {cache.free_bytes / gib:.2f} GiB "
                f"are free on {device}; kv_cache='fp8' or kv_predictor='hold' need less",
                stacklevel=2,
            )

    def _count(
        self, step: int, reason: str | None, fresh: bool, tiles: Tensor | None, oldest: Tensor
    ) -> None:
        tokens = math.prod(self.call.grid)
        record = self.state.steps.get(step)
        if record is None:
            record = self.state.steps[step] = StepRecord(
                active=tokens,
                tokens=tokens,
                prompt=self.call.text_length,
                text=self.call.text_length,
                tiles=tiles,
                oldest=oldest,
            )
        self._record = record
        record.calls += 1
        record.fresh += fresh
        if reason is not None:
            record.dense_calls[reason] += 1
        elif self._places is not None:
            record.active = min(record.active, self._places.shape[1])

    def _open(self, sigma: Float[Tensor, ""], shape: tuple[int, int], repeats: bool) -> None:
        """Point every store at what this context has cached."""
        self._factor, same = self.context.begin(sigma, self._places, shape)
        self._same = same if repeats else None
        self._point_stores("image", shape[1], self._flat, self._factor, self._same)

    def _point_stores(
        self,
        layout: str,
        length: int,
        index: Int[Tensor, " rn"] | None,
        factor: Float[Tensor, "r l"],
        same: Float[Tensor, "r l"] | None,
        text: int | None = 0,
    ) -> None:
        """Point the stores of this layout at what the context has cached.

        Args:
            text: tokens before the image in each row; None: not the same in all rows.
        """
        assert self.plan is not None
        latents = self.call.hidden_states
        like = latents.new_empty(0, dtype=_compute_dtype(latents))
        if index is not None:
            # Compiled blocks then serve every count from the first one on.
            torch._dynamo.maybe_mark_dynamic(index, 0)
        for name, layer in self.layers.items():
            if layer.layout != layout:
                continue
            if name not in self.context.kv:
                k, v = (
                    History(
                        latents.shape[0],
                        length,
                        (layer.kv_heads, layer.head_dim),
                        like,
                        linear=self.plan.linear_kv,
                        policy=self.config.kv_cache,
                    )
                    for _ in range(2)
                )
                self.context.kv[name] = (k, v)
            store = self.stores[name]
            totals = None
            if store.feature_map is not None and not self.plan.linear_kv and text is not None:
                totals = self._totals(name, layer, store.feature_map)
            store.open(
                self.context.kv[name],
                index,
                factor.flatten(),
                None if same is None else same.flatten(),
                totals,
                text or 0,
            )

    def _totals(self, name: str, layer: AttentionLayer, feature_map: str) -> LinearState:
        """Sums over this context's image keys in one layer, zero at first."""
        if name not in self.context.totals:
            latents = self.call.hidden_states
            dtype = torch.promote_types(latents.dtype, torch.float32)
            shape = (latents.shape[0], layer.kv_heads, layer.head_dim)
            self.context.totals[name] = LinearState(
                latents.new_zeros(*shape, layer.head_dim, dtype=dtype),
                latents.new_zeros(shape, dtype=dtype),
                feature_map,
            )
        return self.context.totals[name]

    def _observe(
        self,
        plan: RunPlan,
        step: int,
        latents: Float[Tensor, "s c ..."],
        grid: tuple[int, int, int],
    ) -> None:
        """Score how the last step changed the latents: the guided update that was really made."""
        if self.config.selection not in ("std", "l2norm") or step == plan.observed:
            return
        latents = _for_rows(latents, len(plan.selection.age))
        if plan.latents is not None:
            cells = _by_token(latents.float() - plan.latents.float(), grid)
            cell = cells.shape[2]
            scores = token_scores(cells.flatten(2), self.config.selection, cell)
            if plan.order is not None:
                scores = plan.order.apply(scores)
            members = tile_tokens(scores.shape[1], plan.schedule.tile, scores.device)
            plan.metric = scores[:, members].mean(-1)
        plan.latents, plan.observed = latents, step

    def masks(self, sample: int = 0) -> dict[int, Tensor]:
        """Active tokens of one sample, bool `[t, h, w]`, in each step of the last run that left tokens out."""
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

    # What the hooks of a family call (see `Focus`) --------------------------------------------------

    def complete(self, x: Float[Tensor, "r n c"]) -> Float[Tensor, "r l c"]:
        """Outputs of all tokens from those of the active ones."""
        order = self._order
        if self._factor is None:  # off for this run
            return x if order is None else order.undo(x)
        if self.context.output is None:
            self.context.output = History(
                x.shape[0], x.shape[1], (x.shape[2],), x, linear=self.config.predictor == "linear"
            )
        same = None if self._same is None else self._same.flatten()
        if self._flat is None:
            self.context.output.replace(x, same)
            return x if order is None else order.undo(x)
        full = self.context.output.update(x, self._flat, self._factor.flatten(), same)
        # Never the buffer itself: solvers may keep it, and the next step writes into the buffer.
        return full.clone() if order is None else order.undo(full)

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        """See `Focus.place`."""
        tokens = math.prod(self.call.grid)
        if self._factor is not None:
            factor = _placed(self._factor, length, offsets)
            same = None if self._same is None else _placed(self._same, length, offsets)
            flat = None
            if self._places is not None:
                flat = _flat(joint_index(self._places, tokens, length, offsets), length)
            text = offsets[0] if len(set(offsets)) == 1 else None
            self._point_stores(layout, length, flat, factor, same, text)
            self._record.text = length - tokens
        return None if self.index is None else joint_index(self.index, tokens, length, offsets)


def _for_rows(x: Tensor, rows: int) -> Tensor:
    """What was found for other rows of the same samples: halves of guidance have the same latents, so
    that a batch of both repeats one of them."""
    return x.repeat(max(1, rows // len(x)), *[1] * (x.ndim - 1))[:rows]


def _placed(x: Float[Tensor, "r n"], length: int, offsets: list[int]) -> Float[Tensor, "r l"]:
    """Values of image tokens at their places in longer sequences, 0 elsewhere."""
    longer = x.new_zeros(x.shape[0], length)
    for row, start in enumerate(offsets):
        longer[row, start : start + x.shape[1]] = x[row]
    return longer


def _flat(index: Int[Tensor, "r n"], length: int) -> Int[Tensor, " rn"]:
    """The index into rows laid end to end."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * length).flatten()


def _by_token(
    x: Float[Tensor, "s c ..."], grid: tuple[int, int, int]
) -> Float[Tensor, "s n cell c"]:
    """The latent positions of each token."""
    if x.ndim == 4:
        x = x[:, :, None]
    for axis, (size, n) in enumerate(zip(x.shape[2:], grid, strict=True)):
        x = x.unflatten(2 + 2 * axis, (n, size // n))  # ends as [S, C, t, pt, h, ph, w, pw]
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)


def _compute_dtype(latents: Tensor) -> torch.dtype:
    """What keys come in: autocast's dtype, or that of the latents."""
    kind = latents.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype


def summarise(ras: RegionAdaptiveSampling, host: Host) -> RASSummary:
    """What the last run did."""
    steps = []
    for step, record in sorted(ras.steps.items()):
        dense = record.active == record.tokens
        steps.append(
            StepSummary(
                step=step,
                mode="dense" if dense else "ras",
                active=record.active,
                tokens=record.tokens,
                dense_calls=dict(record.dense_calls),
                oldest=0 if dense else int(record.oldest),
                cost=_cost(host, record),
            )
        )
    return RASSummary(
        config=ras.config.to_dict(),
        steps=steps,
        kv_predictor="linear" if ras.plan is not None and ras.plan.linear_kv else "hold",
        kv_bytes=ras.kv_bytes,
    )


def _cost(host: Host, record: StepRecord) -> float:
    family, transformer = host.family, host.transformer

    def flops(active: int) -> float:
        return family.flops(transformer, active, record.tokens, record.text)

    text = family.text_flops(transformer, record.prompt)
    dense_calls = record.dense_calls.total()
    run = dense_calls * flops(record.tokens) + (record.calls - dense_calls) * flops(record.active)
    return (run + record.fresh * text) / (record.calls * (flops(record.tokens) + text))
