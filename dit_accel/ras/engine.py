"""`RegionAdaptiveSampling`: decides per call which tokens run, and completes what did not."""

import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.config import RASConfig
from dit_accel.models import AttentionLayer, Call, Focus
from dit_accel.models.clock import Clock
from dit_accel.ras import memory
from dit_accel.ras.history import History, KVStore
from dit_accel.ras.predictor import extrapolation_factor
from dit_accel.ras.schedule import Schedule, plan_steps
from dit_accel.ras.selection import band_score, choose, tile_tokens, token_scores


@dataclass
class StepRecord:
    """What one step of a run did."""

    active: int
    """Image tokens that ran, the least over its calls."""
    tokens: int
    text: int = 0
    """Text tokens of the last call."""
    calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    """Dense calls, by reason."""
    oldest: Tensor | int = 0
    """Largest age after the step, in steps."""
    tiles: Tensor | None = None
    """Active tiles `[S, count]`; None on a dense step."""


class ContextState:
    """What is cached for one context: geometry, outputs, keys and values, exact extras."""

    def __init__(self, geometry: tuple, epoch: Any) -> None:
        self.geometry = geometry
        self.epoch = epoch
        self.output: History | None = None
        self.kv: dict[str, tuple[History, History]] = {}
        self.extras: dict[str, Any] = {}
        self.last: Tensor | None = None
        """Noise level of each token's last update, `[S, N]`, and of the one before."""
        self.previous: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Keys and values."""
        return sum(x.nbytes for pair in self.kv.values() for x in pair)


class Selection:
    """Ages and choices of one run: one index set per sample, shared by all contexts of a step."""

    def __init__(
        self, config: RASConfig, schedule: Schedule, samples: int, device: torch.device
    ) -> None:
        self.config = config
        self.schedule = schedule
        shape = (samples, schedule.num_tiles)
        self.age = torch.zeros(shape, dtype=torch.long, device=device)
        self.dropped = torch.zeros(shape, device=device)
        self.step = -1
        self.tiles: Tensor | None = None

    def begin_step(self, step: int, metric: Float[Tensor, "s m"] | None) -> None:
        """Choose for this step, unless a call of it has come before."""
        if step == self.step:
            return
        self.step = step
        count = self.schedule.tiles[step]
        if count is None:
            self.tiles = None
            self.age.zero_()
            return
        score = self._score(step, metric, count)
        limit = self.config.age_limit
        capacity = self.schedule.capacity(step, 0 if limit is None else limit)
        self.tiles = choose(score, self.age, capacity, count, limit)
        self.age += 1
        self.age.scatter_(1, self.tiles, 0)
        self.dropped += 1
        self.dropped.scatter_add_(1, self.tiles, -torch.ones_like(self.tiles, dtype=torch.float32))

    def _score(self, step: int, metric: Tensor | None, count: int) -> Tensor:
        config = self.config
        if config.selection == "random":
            # The same for every sample, so that a batch gives what single runs give.
            generator = torch.Generator().manual_seed(step)
            draw = torch.rand(1, self.age.shape[1], generator=generator, dtype=torch.float64)
            return draw.to(self.age.device).expand_as(self.age)
        if config.selection == "age" or metric is None:
            return self.age.double()
        starved = metric * torch.exp(-config.starvation_scale * self.dropped)
        return band_score(starved, count, config.high_ratio)


class RegionAdaptiveSampling(Focus):
    """RAS of one transformer (arXiv 2502.10389); what the hooks of a family see as `Focus`.

    Args:
        config: what to do.
        layers: the transformer's self-attention layers.
    """

    def __init__(self, config: RASConfig, layers: dict[str, AttentionLayer]) -> None:
        self.config = config
        self.layers = layers
        self.stores = {name: KVStore() for name in layers}
        self.reset()

    def reset(self) -> None:
        """Forget everything: a run begins, or one broke off."""
        self.steps: dict[int, StepRecord] = {}
        self.schedule: Schedule | None = None
        self.selection: Selection | None = None
        self.per_run: dict[str, Any] = {}
        self.grid: tuple[int, int, int] = (0, 0, 0)
        self.linear_kv = False
        self.off: str | None = None
        """Why RAS is off for the whole run."""
        self.kv_bytes = 0
        self._sigmas: Tensor | None = None
        self._latents: Tensor | None = None
        self._metric: Tensor | None = None
        self._metric_step = -1
        self._finish_call()

    def _finish_call(self) -> None:
        for store in self.stores.values():
            store.close()
        self.call: Call = None  # type: ignore[assignment]
        self.context: ContextState = None  # type: ignore[assignment]
        self.index: Tensor | None = None
        self._flat: Tensor | None = None
        self._record: StepRecord = None  # type: ignore[assignment]

    @property
    def per_context(self) -> dict[str, Any]:
        return self.context.extras

    # A call ---------------------------------------------------------------------------------------

    def begin_call(self, clock: Clock, call: Call, grid: tuple[int, int, int], halves: int) -> None:
        """Decide what this call runs on.

        Args:
            clock: has just ticked for this call.
            call: of the family.
            grid: image tokens (t, h, w).
            halves: rows of guidance in one run for each sample, over all contexts.
        """
        latents = call.hidden_states
        rows = latents.shape[0]
        samples = rows // 2 if call.guided else rows
        tokens = math.prod(grid)
        self._plan(clock, call, grid, samples, rows=max(rows, samples * halves))
        assert self.schedule is not None
        assert self.selection is not None
        step = min(clock.step, self.schedule.num_steps - 1)
        self.call, self.grid = call, grid
        self._observe(step, latents, samples)
        self.selection.begin_step(step, self._tile_metric())

        geometry = (rows, samples, grid, latents.dtype, latents.device)
        known: ContextState | None = clock.context.state
        fresh = known is None or known.geometry != geometry or known.epoch != call.epoch
        if known is None or fresh:
            known = clock.context.state = ContextState(geometry, call.epoch)
        self.context = known

        tiles = self.selection.tiles
        reason = self.off
        if reason is None and tiles is None:
            reason = "dense step"
        if reason is None and fresh:
            reason = "first call of a context"
        if reason is None:
            assert tiles is not None
            members = tile_tokens(tokens, self.schedule.tile, latents.device)
            index = members[tiles].flatten(1)
            self.index = index.repeat(rows // samples, 1)
            offsets = torch.arange(rows, device=index.device)[:, None] * tokens
            self._flat = (self.index + offsets).flatten()

        record = self.steps.get(step)
        if record is None:
            record = StepRecord(active=tokens, tokens=tokens, tiles=tiles)
            record.oldest = self.selection.age.amax()
            self.steps[step] = record
        record.calls += 1
        record.text = call.context.shape[1] if call.context.ndim > 2 else 0
        if reason is not None:
            record.dense_calls[reason] += 1
        else:
            record.active = min(record.active, self.index.shape[1])  # type: ignore[union-attr]
        self._record = record

        if self.off is None:
            self._open(clock, step, samples, tokens, fresh)

    def end_call(self, clock: Clock, failed: bool) -> None:
        """Forget what belongs to this call; after the last one, or a failure, give memory back."""
        if failed:
            for context in clock.contexts.values():
                context.state = None
            self.reset()
            return
        if clock.step >= clock.num_steps - 1:
            clock.context.state = None
        self._finish_call()

    def _plan(
        self, clock: Clock, call: Call, grid: tuple[int, int, int], samples: int, rows: int
    ) -> None:
        """The schedule and the selection of this run; made again if its length or geometry changes."""
        device = call.hidden_states.device
        tokens = math.prod(grid)
        known = self.schedule is not None and self.selection is not None
        if (
            known
            and self.schedule.num_steps == clock.num_steps  # type: ignore[union-attr]
            and self.grid == grid
            and len(self.selection.age) == samples  # type: ignore[union-attr]
            and self.selection.age.device == device  # type: ignore[union-attr]
        ):
            return
        self.schedule = plan_steps(self.config, clock.num_steps, tokens)
        self.selection = Selection(self.config, self.schedule, samples, device)
        self.per_run = {}
        self._latents = self._metric = None
        sigmas = clock.sigmas()
        if sigmas is None:
            raise ValueError(
                f"pipe.scheduler: {type(clock.pipe.scheduler).__name__} has no sigmas; "
                "accepted are schedulers with noise levels, such as FlowMatchEulerDiscreteScheduler"
            )
        self._sigmas = sigmas.to(device=device, dtype=torch.float32)
        self.off = None
        if tokens < self.schedule.tile:
            self.off = f"{tokens} tokens are fewer than a tile of {self.schedule.tile}"
        elif all(count is None for count in self.schedule.tiles):
            self.off = "the schedule has dense steps only"
        else:
            self._choose_memory(call, tokens, rows, clock.num_steps)

    def _choose_memory(self, call: Call, tokens: int, rows: int, num_steps: int) -> None:
        """Whether keys and values are extrapolated, and whether they fit at all."""
        device = call.hidden_states.device
        text = call.context.shape[1] if call.context.ndim > 2 else 0
        itemsize = _compute_dtype(call.hidden_states).itemsize
        sizes = [
            (tokens + (0 if x.layout == "image" else text), x.kv_heads, x.head_dim)
            for x in self.layers.values()
        ]
        free = memory.free_bytes(device)

        def need(linear: bool) -> int:
            return memory.cache_bytes(sizes, rows, itemsize, self.config.kv_cache, linear)

        self.linear_kv = self.config.linear_kv(num_steps)
        if self.config.kv_predictor == "auto" and need(True) > free:
            self.linear_kv = False
        if need(self.linear_kv) > free:
            gib = 2.0**30
            self.off = "not enough memory for cached keys and values"
            warnings.warn(
                f"ras: off for this run: cached keys and values need {need(self.linear_kv) / gib:.2f} GiB, "
                f"{free / gib:.2f} GiB are free on {device}; kv_cache='fp8' or kv_predictor='hold' need less",
                stacklevel=2,
            )

    def _open(self, clock: Clock, step: int, samples: int, tokens: int, fresh: bool) -> None:
        """Point every store at what this context has cached."""
        context = self.context
        sigma = self._sigmas[step]  # type: ignore[index]
        if fresh:
            context.last = sigma.expand(samples, tokens).clone()
            context.previous = context.last.clone()
        assert context.last is not None
        assert context.previous is not None
        rows = self.call.hidden_states.shape[0] // samples
        factor = extrapolation_factor(sigma, context.last, context.previous)
        self._factor = factor.repeat(rows, 1)
        self._same = None
        if clock.repeats:
            same = (context.last == sigma) & (not fresh)
            self._same = same.float().repeat(rows, 1)
        self._note_update(sigma, samples)
        self._attach("image", tokens, self._flat, self._factor, self._same)

    def _note_update(self, sigma: Tensor, samples: int) -> None:
        """Noise levels of updates, after this call."""
        context = self.context
        last, previous = context.last, context.previous
        assert last is not None
        assert previous is not None
        moved = torch.where(last == sigma, previous, last)
        if self.index is None:
            context.previous, context.last = moved, sigma.expand_as(last).clone()
        else:
            index = self.index[:samples]
            previous.scatter_(1, index, moved.gather(1, index))
            last.scatter_(1, index, sigma.expand(index.shape))

    def _attach(
        self,
        layout: str,
        length: int,
        index: Int[Tensor, " rn"] | None,
        factor: Float[Tensor, "r l"],
        same: Float[Tensor, "r l"] | None,
    ) -> None:
        latents = self.call.hidden_states
        like = latents.new_empty(0, dtype=_compute_dtype(latents))
        for name, layer in self.layers.items():
            if layer.layout != layout:
                continue
            if name not in self.context.kv:
                self.context.kv[name] = tuple(  # type: ignore[assignment]
                    History(
                        latents.shape[0],
                        length,
                        (layer.kv_heads, layer.head_dim),
                        like,
                        linear=self.linear_kv,
                        policy=self.config.kv_cache,
                    )
                    for _ in range(2)
                )
            self.stores[name].open(
                self.context.kv[name],
                index,
                factor.flatten(),
                None if same is None else same.flatten(),
            )
        self.kv_bytes = max(self.kv_bytes, self.context.nbytes)

    def focus(self, sample: int = 0) -> list[Tensor | None]:
        """Who was active in each step of the last run, bool `[t, h, w]` of one sample; None: everyone."""
        if self.schedule is None:
            return []
        masks: list[Tensor | None] = []
        for _, record in sorted(self.steps.items()):
            if record.tiles is None or record.active == record.tokens:
                masks.append(None)
                continue
            members = tile_tokens(record.tokens, self.schedule.tile, record.tiles.device)
            mask = torch.zeros(record.tokens, dtype=torch.bool, device=record.tiles.device)
            mask[members[record.tiles[sample]].flatten()] = True
            masks.append(mask.view(self.grid).cpu())
        return masks

    # What the selection looks at --------------------------------------------------------------------

    def _observe(self, step: int, latents: Tensor, samples: int) -> None:
        """Keep how the last step changed the latents (the guided update the scheduler really made)."""
        if self.config.selection not in ("std", "l2norm") or step == self._metric_step:
            return
        latents = latents[:samples, : self.call.channels]
        if self._latents is not None:
            self._metric = self._token_metric(latents.float() - self._latents.float())
        self._latents, self._metric_step = latents, step

    def _token_metric(self, change: Float[Tensor, "s c *g"]) -> Float[Tensor, "s n"]:
        if change.ndim == 4:
            change = change[:, :, None]
        cell = [size // n for size, n in zip(change.shape[2:], self.grid, strict=True)]
        parts = change
        for axis, p in enumerate(cell):
            parts = parts.unflatten(2 + 2 * axis, (-1, p))  # [S, C, t, pt, h, ph, w, pw]
        tokens = parts.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(1, 3).flatten(2)
        return token_scores(tokens, self.config.selection, math.prod(cell))

    def _tile_metric(self) -> Float[Tensor, "s m"] | None:
        if self._metric is None:
            return None
        assert self.schedule is not None
        members = tile_tokens(self._metric.shape[1], self.schedule.tile, self._metric.device)
        return self._metric[:, members].mean(-1)

    # What the hooks of a family call (see `Focus`) --------------------------------------------------

    def complete(self, x: Float[Tensor, "r n c"]) -> Float[Tensor, "r l c"]:
        """Outputs of all tokens from those of the active ones."""
        if self.off is not None or self.context is None:
            return x
        if self.context.output is None:
            self.context.output = History(
                x.shape[0], x.shape[1], (x.shape[2],), x, linear=self.config.predictor == "linear"
            )
        same = None if self._same is None else self._same.flatten()
        if self._flat is None:
            self.context.output.replace(x, same)
            return x
        full = self.context.output.update(x, self._flat, self._factor.flatten(), same)
        return full.clone()  # solvers may keep it, and the next step writes into the buffer

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        """See `Focus.place`."""
        if self.off is not None:
            return None
        rows, tokens = self._factor.shape
        factor = self._factor.new_zeros(rows, length)
        same = None if self._same is None else torch.zeros_like(factor)
        for r, start in enumerate(offsets):
            factor[r, start : start + tokens] = self._factor[r]
            if same is not None and self._same is not None:
                same[r, start : start + tokens] = self._same[r]
        index = None if self.index is None else joint_index(self.index, tokens, length, offsets)
        flat = None
        if index is not None:
            flat = (index + torch.arange(rows, device=index.device)[:, None] * length).flatten()
        self._attach(layout, length, flat, factor, same)
        return index


def joint_index(
    index: Int[Tensor, "r n"], tokens: int, length: int, offsets: list[int]
) -> Int[Tensor, "r m"]:
    """Places of [text, active image tokens, padding] in sequences of [text, image, padding].

    Args:
        index: active image tokens of each row.
        tokens: image tokens in all.
        length: of the full sequences.
        offsets: text tokens of each row.
    """
    every = torch.arange(length, device=index.device)
    return torch.stack(
        [
            torch.cat([every[:start], row + start, every[start + tokens :]])
            for row, start in zip(index, offsets, strict=True)
        ]
    )


def _compute_dtype(latents: Tensor) -> torch.dtype:
    """What keys come in: autocast's dtype, or that of the latents."""
    kind = latents.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype
