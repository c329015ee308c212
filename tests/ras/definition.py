"""Forecast steps in plain torch: whole outputs, one row after the other, and every sum written out."""

import torch

from dit_accel.ras.budget import step_intervals
from dit_accel.ras.predictor import DAMPING, FORGET, LARGEST_CORRECTION


class Definition:
    """Replacement of `transformer.forward` that runs the plain transformer in some of the steps.

    Args:
        transformer: a plain one.
        modes: "dense" or "forecast", of each step.
        levels: noise levels of the steps and of the end.
        correction: `RASConfig.correction`.
    """

    def __init__(self, transformer, modes, levels, correction=0.5):
        self.modes, self.levels, self.correction = modes, levels, correction
        self.intervals = step_intervals(levels)
        self.forward = transformer.forward
        self.contexts = {}
        transformer.forward = self.call

    def call(self, *args, **kwargs):
        text = kwargs["encoder_hidden_states"]
        # The tensor is kept: its id stays its own.
        state = self.contexts.setdefault(id(text), {"text": text, "step": -1, "rows": None})
        state["step"] += 1
        step = state["step"]
        if self.modes[step] == "forecast":
            return (torch.stack([row.forecast(self, step) for row in state["rows"]]).float(),)
        output = self.forward(*args, **kwargs)[0].double()
        if state["rows"] is None:
            state["rows"] = [Row() for _ in output]
        rows = zip(state["rows"], output, strict=True)
        return (torch.stack([row.update(self, step, y) for row, y in rows]).float(),)


class Row:
    def __init__(self):
        self.seen, self.owed = [], []
        self.line = self.square = 0.0

    def slope(self, s):
        (before, old), (last, new) = self.seen[-2:]
        return min(max((s - last) / (last - before), 0.0), 1.0) * (new - old)

    def forecast(self, to, step):
        s, (_, last) = to.levels[step], self.seen[-1]
        guess = last
        if len(self.seen) > 1:
            g = min(max(self.line / self.square, 0.0), 1.0) if self.square else DAMPING
            guess = last + g * self.slope(s)
        self.owed.append((to.intervals[step], s, guess))
        return guess

    def update(self, to, step, y):
        s, corrected = to.levels[step], y
        if self.seen:
            last, old = self.seen[-1]
            total = sum(interval for interval, *_ in self.owed)
            for interval, at, guess in self.owed:
                true = old if s == last else old + (at - last) / (s - last) * (y - old)
                share = interval / max(to.intervals[step], total / LARGEST_CORRECTION)
                corrected = corrected + to.correction * share * (true - guess)
            self.owed = []
        if len(self.seen) > 1:
            line = self.slope(s)
            self.line = FORGET * self.line + float((line * (y - old)).sum())
            self.square = FORGET * self.square + float((line * line).sum())
        if self.seen and self.seen[-1][0] == s:
            self.seen.pop()  # a second call at the same noise level takes the place of the first
        self.seen.append((s, y))
        return corrected
