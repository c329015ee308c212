"""`Outputs` against a memory of single tokens, in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.ras.outputs import Outputs
from dit_accel.ras.predictor import DAMPING, FORGET, LARGEST_CORRECTION, Distance

GRID, PATCH, CHANNELS = (2, 2, 1), (1, 2, 1), 3
TOKENS = 4


def tokens(x):
    """Convert `[R, C, T, H, W]` to `[R, N, values of a token]`."""
    (t, h, w), (pt, ph, pw) = GRID, PATCH
    x = x.reshape(len(x), CHANNELS, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(len(x), TOKENS, -1)


class Plain:
    """Updates of one row: a list of (level, value) for each token."""

    def __init__(self, predictor, correction):
        self.predictor, self.correction = predictor, correction
        self.seen = [[] for _ in range(TOKENS)]
        self.owed = [[] for _ in range(TOKENS)]
        self.line = self.square = None

    def g(self):
        if self.predictor != "fitted":
            return float(self.predictor == "linear")
        if not self.square:
            return DAMPING
        return min(max(self.line / self.square, 0.0), 1.0)

    def slope(self, n, s):
        """Return f (y_a - y_b) of a token."""
        if len(self.seen[n]) < 2:
            return torch.zeros_like(self.seen[n][-1][1])
        (before, old), (last, new) = self.seen[n][-2:]
        return min(max((s - last) / (last - before), 0.0), 1.0) * (new - old)

    def forecast(self, n, s):
        return self.seen[n][-1][1] + self.g() * self.slope(n, s)

    def step(self, s, interval, values, active):
        """Return output and squared errors of each token; no token runs if `values` is None."""
        if values is not None and not self.seen[0]:
            for n in range(TOKENS):
                self.seen[n].append((s, values[n]))
            return list(values), None
        guess = [self.forecast(n, s) for n in range(TOKENS)]
        out, errors, terms = [], [], [0.0, 0.0]
        for n in range(TOKENS):
            ran = values is not None and active[n]
            if not ran:
                self.owed[n].append((interval, s, guess[n]))
                out.append(guess[n])
                errors.append(0.0)
                continue
            errors.append(float((values[n] - guess[n]).square().sum()))
            last, old = self.seen[n][-1]
            extra = torch.zeros_like(old)
            for width, at, made in self.owed[n]:
                true = old + (at - last) / (s - last) * (values[n] - old)
                extra += width * (true - made)
            total = sum(width for width, *_ in self.owed[n])
            extra *= self.correction / max(interval, total / LARGEST_CORRECTION, 1e-6)
            out.append(values[n] + extra)
            self.owed[n] = []
            terms[0] += float((self.slope(n, s) * (values[n] - old)).sum())
            terms[1] += float(self.slope(n, s).square().sum())
        if values is not None:
            lines = any(len(x) >= 2 for x in self.seen)
            if lines and any(active):
                kept = (self.line or 0.0, self.square or 0.0)
                self.line, self.square = (FORGET * a + b for a, b in zip(kept, terms, strict=True))
            for n in range(TOKENS):
                if active[n]:
                    self.seen[n].append((s, values[n]))
        return out, errors


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    predictor=st.sampled_from(["fitted", "linear", "hold"]),
    correction=st.sampled_from([0.0, 0.5, 1.0]),
    channel_axis=st.sampled_from([1, 2]),
    kinds=st.lists(st.sampled_from(["dense", "partial", "forecast"]), min_size=3, max_size=8),
)
def test_equals_what_single_tokens_remember(seed, predictor, correction, channel_axis, kinds):
    generator = torch.Generator().manual_seed(seed)
    rows = 2
    shape = (rows, CHANNELS, *(g * p for g, p in zip(GRID, PATCH, strict=True)))
    outputs = Outputs(predictor, GRID, correction=correction, channel_axis=channel_axis)
    plain = [Plain(predictor, correction) for _ in range(rows)]
    kinds = ["dense", *kinds]
    levels = torch.rand(len(kinds) + 1, generator=generator, dtype=torch.float64)
    levels = levels.cumsum(0).flip(0) / levels.sum()
    last = previous = None
    for k, kind in enumerate(kinds):
        s, interval = levels[k], levels[k] - levels[k + 1]
        if last is None:
            last = previous = s.expand(rows, TOKENS).clone()
        gap = last - previous
        factor = torch.where(gap == 0, 0.0, (s - last) / torch.where(gap == 0, 1.0, gap))
        at = Distance(factor.clamp(0, 1), torch.zeros_like(last), (s - last).abs())
        if kind == "forecast":
            got, errors = outputs.answer(at, interval).movedim(channel_axis, 1), None
            expected = [x.step(float(s), float(interval), None, None) for x in plain]
        else:
            new = torch.randn(shape, generator=generator, dtype=torch.float64)
            active = torch.ones(rows, TOKENS, dtype=torch.bool)
            if kind == "partial":
                active = torch.rand(rows, TOKENS, generator=generator) < 0.5
            got, errors = outputs.record(
                new.movedim(1, channel_axis),
                at,
                interval,
                None if kind == "dense" else active,
                measure=True,
            )
            got = got.movedim(channel_axis, 1)
            expected = [
                x.step(float(s), float(interval), tokens(new)[r], active[r].tolist())
                for r, x in enumerate(plain)
            ]
            previous = torch.where(active, last, previous)
            last = torch.where(active, s, last)
        for r, (out, wrong) in enumerate(expected):
            torch.testing.assert_close(tokens(got)[r], torch.stack(out), rtol=1e-8, atol=1e-8)
            if errors is not None and wrong is not None:
                assert errors[r].tolist() == pytest.approx(
                    (torch.tensor(wrong) / _size(kind, got, outputs, r, active, new)).tolist(),
                    rel=1e-4,
                    abs=1e-6,
                )


def _size(kind, got, outputs, row, active, new):
    """Mean square of the complete output, before correction."""
    complete = tokens(new)[row] if kind == "dense" else None
    if complete is None:
        complete = torch.where(active[row][:, None], tokens(new)[row], tokens(got)[row])
    return float(complete.square().mean())


def test_one_factor_for_each_row_without_a_grid():
    """Outputs may have tokens in one axis, as in FLUX."""
    outputs = Outputs("linear")
    one = torch.ones(())

    def at(factor):
        x = torch.full((2, 1), factor)
        return Distance(x, torch.zeros_like(x), torch.ones_like(x))

    first, second = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    outputs.record(first, at(0.0), one)
    outputs.record(second, at(1.0), one)
    torch.testing.assert_close(outputs.answer(at(0.5), one), second + 0.5 * (second - first))
    assert outputs.nbytes == 2 * first.nbytes


def test_what_is_returned_is_nobody_elses_memory():
    """Outputs are copies, because solvers keep them and pipelines may write into them."""
    outputs = Outputs("fitted", correction=0.5)
    at = Distance(*(torch.zeros(1, 1),) * 3)
    one, new = torch.ones(()), torch.randn(1, 4)
    returned, _ = outputs.record(new, at, one)
    returned.zero_()
    forecast = outputs.answer(at, one)
    assert (forecast != 0).all()
    forecast.zero_()
    assert (outputs.answer(at, one) != 0).all()


def test_a_second_output_at_the_same_noise_level_replaces_the_first():
    outputs = Outputs("linear")
    one = torch.ones(())

    def at(factor, same):
        return Distance(*(torch.full((1, 1), x) for x in (factor, same, 1.0 - same)))

    for value, same in ((1.0, 0.0), (3.0, 0.0), (4.0, 1.0)):
        outputs.record(torch.full((1, 2), value), at(0.0, same), one, repeats=True)
    assert outputs.answer(at(1.0, 0.0), one).tolist() == [[7.0, 7.0]]
