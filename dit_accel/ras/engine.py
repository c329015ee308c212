"""`RegionAdaptiveSampling`: decides per call which tokens run, and completes what did not."""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.config import RASConfig
from dit_accel.kernels import LinearState
from dit_accel.models import AttentionLayer, Call, Focus, TokenOrder, joint_index
from dit_accel.ras import memory
from dit_accel.ras.ages import Selection
from dit_accel.ras.context import ContextState
from dit_accel.ras.history import History, KVStore
from dit_accel.ras.schedule import Schedule, plan_steps
from dit_accel.ras.selection import tile_tokens, token_scores
from dit_accel.runtime.clock import Clock


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
class Run:
    """What the calls of one run share; made again if its length or geometry changes."""

    schedule: Schedule
    selection: Selection
    sigmas: Float[Tensor, " steps"]
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


def _as_configured(grid: tuple[int, int, int], device: torch.device) -> None:
    """Nobody else has a say."""


class RegionAdaptiveSampling(Focus):
    """RAS of one transformer (arXiv 2502.10389); what the hooks of a family see as `Focus`.

    Args:
        config: what to do.
        layers: the transformer's self-attention layers.
        tile: tokens of a grid that are selected together; None (the default): as `config.region` says.
        order: the order in which the tokens of a grid run; None (the default): raster.
    """

    def __init__(
        self,
        config: RASConfig,
        layers: dict[str, AttentionLayer],
        *,
        tile: Callable[[tuple[int, int, int], torch.device], int | None] = _as_configured,
        order: Callable[[tuple[int, int, int], torch.device], TokenOrder | None] = _as_configured,
    ) -> None:
        self.config = config
        self.layers = layers
        self.tile = tile
        self.order = order
        self.stores = {name: KVStore() for name in layers}
        self.reset()

    def reset(self) -> None:
        """Forget everything: a run begins, or one broke off."""
        self.steps: dict[int, StepRecord] = {}
        self.run: Run | None = None
        self.kv_bytes = 0
        """Most that cached keys and values have taken, all contexts together."""
        self._finish_call()

    def _finish_call(self) -> None:
        for store in self.stores.values():
            store.close()
        self.call: Call = None  # type: ignore[assignment]
        self.context: ContextState = None  # type: ignore[assignment]
        self.index: Tensor | None = None
        self._places: Tensor | None = None
        self._flat: Tensor | None = None
        self._factor: Tensor | None = None
        self._same: Tensor | None = None
        self._record: StepRecord = None  # type: ignore[assignment]

    @property
    def per_run(self) -> dict[str, Any]:
        assert self.run is not None
        return self.run.extras

    @property
    def per_context(self) -> dict[str, Any]:
        return self.context.extras

    # A call ---------------------------------------------------------------------------------------

    def begin_call(
        self, clock: Clock, call: Call, grid: tuple[int, int, int], contexts: int
    ) -> None:
        """Decide what this call runs on.

        Args:
            clock: has just ticked for this call.
            call: of the family.
            grid: image tokens (t, h, w).
            contexts: of this many rows that the run will have (for its memory).
        """
        latents = call.hidden_states
        rows, tokens = latents.shape[0], math.prod(grid)
        run = self.run = self._run_of(clock, call, grid, contexts)
        step = min(clock.step, run.schedule.num_steps - 1)
        late = clock.step >= run.schedule.num_steps
        self._observe(run, step, call.noisy_latents, grid)
        run.selection.begin_step(step, run.metric)

        geometry = (rows, grid, latents.dtype, latents.device)
        state: ContextState | None = clock.context.state
        fresh = state is None or state.geometry != geometry or state.epoch != call.epoch
        if state is None or fresh:
            state = clock.context.state = ContextState(geometry, call.epoch)
        self.call, self.context = call, state

        tiles = run.selection.tiles
        reason = run.off
        if reason is None and late:
            # Called by hand, or by a pipeline with another scheduler: its step is not known.
            reason = "past the scheduler's last step"
        elif reason is None and tiles is None:
            reason = "dense step"
        elif reason is None and fresh:
            reason = "first call of a context"
        if reason is None and tiles is not None:
            every = tile_tokens(tokens, run.schedule.tile, latents.device)
            chosen = every[tiles].flatten(1)
            if tiles.shape[1] == run.schedule.num_tiles:
                # A short last tile repeats a token, which no step on all tokens needs.
                chosen = chosen[:, :tokens]
            self._places = _for_rows(chosen, rows)
            self._flat = _flat(self._places, tokens)
        self.index = self._places
        if run.order is not None:
            raster = run.order.gather
            self.index = raster.expand(rows, -1) if self._places is None else raster[self._places]
        self._count(run, step, tokens, reason, fresh)
        if run.off is None and not late:
            self._open(clock, run.sigmas[step], (rows, tokens))

    def end_call(self, clock: Clock, failed: bool) -> None:
        """Forget what belongs to this call; after the last one, or a failure, give memory back."""
        if failed:
            _forget(clock)
            self.reset()
            return
        states = [context.state for context in clock.contexts.values()]
        self.kv_bytes = max(self.kv_bytes, sum(x.nbytes for x in states if x is not None))
        if clock.step >= clock.num_steps - 1:
            clock.context.state = None
            if self.run is not None:
                self.run.latents = None
                self.run.extras.clear()
        self._finish_call()

    def _run_of(self, clock: Clock, call: Call, grid: tuple[int, int, int], contexts: int) -> Run:
        device = call.hidden_states.device
        rows = call.hidden_states.shape[0]
        key = (clock.num_steps, grid, device)
        if self.run is not None:
            chosen_for = len(self.run.selection.age)
            if self.run.key == key and (rows % chosen_for == 0 or chosen_for % rows == 0):
                return self.run
            _forget(clock)  # what was cached fits another plan
        tokens = math.prod(grid)
        sigmas = clock.sigmas()
        if sigmas is None:
            raise ValueError(
                f"pipe.scheduler: {type(clock.scheduler).__name__} has no sigmas; "
                "accepted are schedulers with noise levels, such as FlowMatchEulerDiscreteScheduler"
            )
        schedule = plan_steps(self.config, clock.num_steps, tokens, self.tile(grid, device))
        run = Run(
            schedule,
            Selection(self.config, schedule, rows, device),
            sigmas.to(device=device, dtype=torch.float32),
            key,
            order=self.order(grid, device),
        )
        if getattr(clock.scheduler, "num_inference_steps", None) is None:
            # The transformer is called by somebody who steps another scheduler.
            run.off = "pipe.scheduler was not told its steps"
        elif schedule.num_tiles < 2:
            run.off = f"{tokens} tokens are not more than a tile of {schedule.tile}"
        elif all(count is None for count in schedule.tiles):
            run.off = "the schedule has dense steps only"
        else:
            self._choose_memory(run, call, tokens, rows, contexts)
        return run

    def _choose_memory(self, run: Run, call: Call, tokens: int, rows: int, contexts: int) -> None:
        """Whether keys and values are extrapolated, and whether they fit at all."""
        device = call.hidden_states.device
        plan = memory.plan_cache(
            self.config,
            run.schedule.num_steps,
            memory.cached_layers(self.layers, tokens, call.text_length),
            rows=rows,
            contexts=contexts,
            itemsize=_compute_dtype(call.hidden_states).itemsize,
            free=memory.free_bytes(device),
        )
        run.linear_kv = plan.linear_kv
        if not plan.fits:
            gib = 2.0**30
            run.off = "not enough memory for cached keys and values"
            warnings.warn(
                f"ras: off for this run: cached keys and values need {plan.kv_bytes / gib:.2f} GiB beside "
                f"{plan.working_bytes / gib:.2f} GiB for the model's own work, {plan.free_bytes / gib:.2f} GiB "
                f"are free on {device}; kv_cache='fp8' or kv_predictor='hold' need less",
                stacklevel=2,
            )

    def _count(self, run: Run, step: int, tokens: int, reason: str | None, fresh: bool) -> None:
        record = self.steps.get(step)
        if record is None:
            selection = run.selection
            record = self.steps[step] = StepRecord(
                active=tokens,
                tokens=tokens,
                prompt=self.call.text_length,
                text=self.call.text_length,
                tiles=selection.tiles,
                oldest=selection.age.amax(),
            )
        self._record = record
        record.calls += 1
        record.fresh += fresh
        if reason is not None:
            record.dense_calls[reason] += 1
        elif self._places is not None:
            record.active = min(record.active, self._places.shape[1])

    def _open(self, clock: Clock, sigma: Float[Tensor, ""], shape: tuple[int, int]) -> None:
        """Point every store at what this context has cached."""
        self._factor, same = self.context.begin(sigma, self._places, shape)
        self._same = same if clock.repeats else None
        self._attach("image", shape[1], self._flat, self._factor, self._same)

    def _attach(
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
        assert self.run is not None
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
                        linear=self.run.linear_kv,
                        policy=self.config.kv_cache,
                    )
                    for _ in range(2)
                )
                self.context.kv[name] = (k, v)
            store = self.stores[name]
            totals = None
            if store.feature_map is not None and not self.run.linear_kv and text is not None:
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
        self, run: Run, step: int, latents: Float[Tensor, "s c ..."], grid: tuple[int, int, int]
    ) -> None:
        """Score how the last step changed the latents: the guided update that was really made."""
        if self.config.selection not in ("std", "l2norm") or step == run.observed:
            return
        latents = _for_rows(latents, len(run.selection.age))
        if run.latents is not None:
            cells = _by_token(latents.float() - run.latents.float(), grid)
            cell = cells.shape[2]
            scores = token_scores(cells.flatten(2), self.config.selection, cell)
            if run.order is not None:
                scores = run.order.apply(scores)
            members = tile_tokens(scores.shape[1], run.schedule.tile, scores.device)
            run.metric = scores[:, members].mean(-1)
        run.latents, run.observed = latents, step

    def focus(self, sample: int = 0) -> dict[int, Tensor]:
        """Who was active, bool `[t, h, w]` of one sample, in each step of the last run that left
        tokens out."""
        masks = {}
        for step, record in sorted(self.steps.items()):
            if self.run is None or record.tiles is None or record.active == record.tokens:
                continue
            members = tile_tokens(record.tokens, self.run.schedule.tile, record.tiles.device)
            mask = torch.zeros(record.tokens, dtype=torch.bool, device=record.tiles.device)
            places = members[record.tiles[sample]].flatten()
            mask[places if self.run.order is None else self.run.order.gather[places]] = True
            masks[step] = mask.view(self.run.key[1]).cpu()
        return masks

    # What the hooks of a family call (see `Focus`) --------------------------------------------------

    def complete(self, x: Float[Tensor, "r n c"]) -> Float[Tensor, "r l c"]:
        """Outputs of all tokens from those of the active ones."""
        order = None if self.run is None else self.run.order
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
        assert self.run is not None
        tokens = math.prod(self.run.key[1])
        if self._factor is not None:
            factor = _placed(self._factor, length, offsets)
            same = None if self._same is None else _placed(self._same, length, offsets)
            flat = None
            if self._places is not None:
                flat = _flat(joint_index(self._places, tokens, length, offsets), length)
            text = offsets[0] if len(set(offsets)) == 1 else None
            self._attach(layout, length, flat, factor, same, text)
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


def _forget(clock: Clock) -> None:
    for context in clock.contexts.values():
        context.state = None


def _compute_dtype(latents: Tensor) -> torch.dtype:
    """What keys come in: autocast's dtype, or that of the latents."""
    kind = latents.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype
