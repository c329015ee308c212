"""`Outputs`: last output of a context, and forecasts of the next one."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.ras.predictor import DAMPING, FORGET, LARGEST_CORRECTION, Distance


@dataclass(frozen=True)
class Owed:
    """Sums over the steps in which a token was forecast since it last ran, `[R, n]` each."""

    gaps: Tensor
    """Sum of interval times difference of noise levels to the last update."""
    factors: Tensor
    """Sum of interval times damped extrapolation factor."""
    intervals: Tensor
    """Sum of the intervals."""


class Outputs:
    """Last complete output of a context, and the change of each token between its last two updates.

    The forecast is y_a + g f (y_a - y_b). y_a and y_b are the last two outputs of a token, f is the
    `extrapolation_factor`, and g in [0, 1] damps the extrapolation. With "fitted", g is the least-squares factor of the
    steps so far, with larger weights for later steps. There is one g for each row, so that a batch gives the results of
    single runs.

    When a token runs again, the line between its last two outputs shows the errors of the forecasts in between. They
    have moved the latents by the sum of interval times error. `record` corrects this: it adds the sum, times
    `correction` and divided by the interval of its own step, to the output that it returns. The cached output is not
    corrected.

    Args:
        predictor: "fitted", "linear" (g = 1) or "hold" (g = 0).
        grid: number of image tokens along (t, h, w), if factors differ between tokens. None: one factor for each row.
        correction: share of the error of earlier steps that is corrected. 1 is exact for Euler's method. Multistep
            solvers use an output in later steps too.
        channel_axis: axis of the channels in outputs with a grid, see `Family.channel_axis`.
    """

    def __init__(
        self,
        predictor: str,
        grid: tuple[int, int, int] | None = None,
        *,
        correction: float = 0.0,
        channel_axis: int = 1,
    ) -> None:
        self.predictor = predictor
        self.correction = correction
        self.grid = grid
        self.channel_axis = channel_axis
        self.last: Tensor | None = None
        self.delta: Tensor | None = None
        self._line: Tensor | None = None
        """Weighted sum over updates of <f delta, change>, `[R]`."""
        self._square: Tensor | None = None
        """Weighted sum over updates of |f delta|^2, `[R]`."""
        self._owed: Owed | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the cached outputs."""
        return sum(x.nbytes for x in (self.last, self.delta) if x is not None)

    def damping(self) -> Float[Tensor, " r"]:
        """Return the damping g of each row."""
        assert self.last is not None
        rows = self.last.shape[0]
        if self.predictor != "fitted":
            return self.last.new_full((rows,), float(self.predictor == "linear"))
        if self._line is None or self._square is None:
            return self.last.new_full((rows,), DAMPING)
        known = self._square > 0
        best = self._line / torch.where(known, self._square, 1.0)
        return torch.where(known, best.clamp(0, 1), DAMPING)

    def answer(self, at: Distance, interval: Float[Tensor, ""]) -> Tensor:
        """Return the forecast of a step in which no token runs.

        Args:
            at: distance of the step to the last updates, in raster order; `n` is 1 without a grid.
            interval: difference of noise levels of the solver step that uses this output.
        """
        self._owe(at, interval, None)
        return self.forecast(at.factor)

    def forecast(self, factor: Float[Tensor, "r n"]) -> Tensor:
        """Return the forecast of all tokens, `[R, ...]`, as a new tensor.

        Args:
            factor: extrapolation factor of each token, in raster order; `n` is 1 without a grid.
        """
        assert self.last is not None
        if self.delta is None or self.predictor == "hold":
            return self.last.clone()
        g = self.damping()[:, None]
        return torch.addcmul(self.last, self._spread((factor * g).to(self.last.dtype)), self.delta)

    def record(
        self,
        output: Tensor,
        at: Distance,
        interval: Float[Tensor, ""],
        active: Bool[Tensor, "r n"] | None = None,
        *,
        repeats: bool = False,
        measure: bool = False,
    ) -> tuple[Tensor, Float[Tensor, "r n"] | None]:
        """Record the output of a call.

        Args:
            output: `[R, ...]`; with a grid `[R, C, (t,) h, w]`, `[R, t, C, h, w]` or tokens `[R, n, C]`. Values of tokens
                that did not run are ignored.
            at, interval: as in `answer`.
            active: tokens that ran; None: all.
            repeats: whether tokens may have been updated at this noise level before. The change of such tokens keeps
                spanning the interval before.
            measure: whether to measure the error of the forecast.

        Returns:
            (complete, errors): the complete, corrected output; and the squared error of each token's forecast, divided by
            the mean square of the row's output. The errors are None if they are not measured or there was no forecast.
        """
        if self.last is None:
            self.last = output.clone()  # the caller may write into it
            return output, None
        ran = None if active is None else self._spread(active)
        guess = None
        if measure or ran is not None:
            guess = self.forecast(at.factor)
        complete = output if ran is None or guess is None else torch.where(ran, output, guess)
        change = complete - self.last
        if ran is not None:
            change = torch.where(ran, change, 0)
        result = self._corrected(complete, change, at, interval, active)
        if self.predictor == "fitted" and self.delta is not None:
            self._fit(self._spread(at.factor.to(change.dtype)) * self.delta, change, ran)
        errors = None
        if measure and guess is not None:
            size = complete.float().flatten(1).square().mean(1).clamp(min=1e-20)
            errors = self._per_token((complete - guess).float().square()) / size[:, None]
        if self.predictor != "hold":
            self._move(change, at.same if repeats else None, ran)
        self.last = complete.clone() if ran is None else torch.where(ran, complete, self.last)
        return result, errors

    def _owe(
        self, at: Distance, interval: Float[Tensor, ""], active: Bool[Tensor, "r n"] | None
    ) -> None:
        """Add a forecast of the tokens that are not active to the sums."""
        if not self.correction:
            return
        damped = at.factor * self.damping().to(at.factor.dtype)[:, None]
        terms = interval * at.gap, interval * damped, interval.expand_as(at.gap)
        if active is not None:
            terms = tuple(torch.where(active, 0.0, x) for x in terms)  # type: ignore[assignment]
        before = self._owed
        if before is not None:
            kept = (before.gaps, before.factors, before.intervals)
            if active is not None:
                kept = tuple(torch.where(active, 0.0, x) for x in kept)  # type: ignore[assignment]
            terms = tuple(a + b for a, b in zip(kept, terms, strict=True))  # type: ignore[assignment]
        self._owed = Owed(*terms)

    def _corrected(
        self,
        complete: Tensor,
        change: Tensor,
        at: Distance,
        interval: Float[Tensor, ""],
        active: Bool[Tensor, "r n"] | None,
    ) -> Tensor:
        """Return the output with the correction of earlier forecasts. Reset the sums of the tokens that ran."""
        owed = self._owed
        if owed is not None:
            least = owed.intervals / LARGEST_CORRECTION
            scale = self.correction / torch.maximum(interval, least).clamp(min=1e-6)
            true = scale * owed.gaps / at.gap.clamp(min=1e-6)
            made = scale * owed.factors
            extra = self._spread(true.to(change.dtype)) * change
            if self.delta is not None:
                extra = extra - self._spread(made.to(change.dtype)) * self.delta
            if active is not None:
                extra = torch.where(self._spread(active), extra, 0)
            complete = complete + extra
        if active is None:
            self._owed = None
        else:
            self._owe(at, interval, active)
        return complete

    def _move(self, change: Tensor, same: Tensor | None, ran: Tensor | None) -> None:
        if self.delta is None:
            self.delta = change
            return
        if same is not None:
            change = change + self._spread(same.to(change.dtype)) * self.delta
        self.delta = change if ran is None else torch.where(ran, change, self.delta)

    def _fit(self, line: Tensor, change: Tensor, ran: Tensor | None) -> None:
        kind = torch.promote_types(line.dtype, torch.float32)
        line, change = line.to(kind).flatten(1), change.to(kind).flatten(1)
        moved = None
        if ran is not None:
            line = line * ran.expand_as(self.last).flatten(1)  # type: ignore[arg-type]
            moved = ran.flatten(1).any(1)  # rows in which no token ran keep their sums
        new = (line * change).sum(1), (line * line).sum(1)
        if self._line is None or self._square is None:
            self._line, self._square = new
            return
        old = self._line, self._square
        line, square = (FORGET * a + b for a, b in zip(old, new, strict=True))
        if moved is not None:
            line = torch.where(moved, line, self._line)
            square = torch.where(moved, square, self._square)
        self._line, self._square = line, square

    def _spread(self, x: Tensor) -> Tensor:
        """Return values of tokens `[R, n]` at the positions of the output, with one channel."""
        assert self.last is not None
        shape = self.last.shape
        if self.grid is None:
            return x.view(len(x), *[1] * (len(shape) - 1))
        if len(shape) == 3:  # the output has tokens, which the pipeline turns into latents
            return x[:, :, None]
        x = x.view(len(x), *self.grid)
        sizes = [n for axis, n in enumerate(shape) if axis not in (0, self.channel_axis)]
        cells = sizes if len(sizes) == 3 else (1, *sizes)
        for axis, (size, n) in enumerate(zip(cells, self.grid, strict=True), start=1):
            x = x.repeat_interleave(size // n, dim=axis)
        return x.view(len(x), *sizes).unsqueeze(self.channel_axis)

    def _per_token(self, x: Tensor) -> Float[Tensor, "r n"]:
        """Return the sum of `x` over the positions of each token."""
        if self.grid is None:
            return x.flatten(1).sum(1, keepdim=True)
        if x.ndim == 3:
            return x.sum(2)
        x = x.sum(self.channel_axis)
        if x.ndim == 3:
            x = x[:, None]
        for axis, n in zip((1, 3, 5), self.grid, strict=True):
            x = x.unflatten(axis, (n, -1))  # becomes [R, t, pt, h, ph, w, pw]
        return x.sum((2, 4, 6)).flatten(1)
