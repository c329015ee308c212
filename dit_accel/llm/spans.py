"""Spans of images and video frames in the prompts of a multimodal model, found by hooks on the model."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import pad

from dit_accel.llm.attention import POLICY
from dit_accel.llm.prefill import Spans

NOTED = "_dit_accel_spans"
"""Attribute of a cache that holds its `Noted`. A copy of the cache takes it along."""
TEXT, IMAGE = 0, -1
"""Labels of tokens; those of video frames count from 1."""
WIDEST = 2**20
"""Positions are smaller than this."""
_numbers = count()


@dataclass(frozen=True)
class Noted:
    """Tokens that a cache holds."""

    labels: Int[Tensor, "b l"]
    place: Int[Tensor, "b 1"]
    """Place of the last token in its frame, see `places_of`."""
    tracker: int
    """Number of the tracker. Another one did not see what the cache got while it was away."""


class SpanTracker:
    """Finds the spans of a call from its tokens, and keeps those of the tokens in the cache.

    The frames of a video are told apart by the positions of their tokens in height and width (M-RoPE). The grids of the
    videos would say the same, but `generate` does not hand them to the model.

    Args:
        config: config of the model.
    """

    def __init__(self, config: Any) -> None:
        self.tokens: dict[str, int] = {
            name: token
            for name in ("image", "video")
            if (token := getattr(config, f"{name}_token_id", None)) is not None
        }
        self.given: Sequence[Spans] | None = None
        """Spans of the rows of each call, in place of those that are found."""
        self._ids: Tensor | None = None
        self._found: Sequence[Spans] | None = None
        self._noted: Noted | None = None
        self._cache: Any = None
        self._number = next(_numbers)
        self._handles: list[Any] = []

    @property
    def multimodal(self) -> bool:
        """Whether the model has tokens for images or videos."""
        return bool(self.tokens)

    @property
    def rows(self) -> Sequence[Spans] | None:
        """Spans of each row of the current call, the tokens in the cache included; None: not known."""
        return self._found if self.given is None else self.given

    def attach(self, model: Any) -> None:
        """Follow the calls of a multimodal model: its tokens, and the positions that its text model gets."""
        if not self.multimodal:
            return
        outer, text = model.base_model, model.get_decoder()
        self._handles = [
            outer.register_forward_pre_hook(self._begin, with_kwargs=True),
            outer.register_forward_hook(self._end, always_call=True),
        ]
        if text is not outer:
            self._handles.append(text.register_forward_pre_hook(self._find, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = _arguments(module, args, kwargs).get("input_ids")
        self._found = self._noted = None

    def _find(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ids is None:  # the tokens of embeddings are not known
            return
        ids, call = self._ids, _arguments(module, args, kwargs)
        self._cache = cache = call.get("past_key_values")
        noted = getattr(cache, NOTED, None)
        if noted is not None and ids.shape[1] == 1:
            self._noted = noted  # decoding: the next prompt takes the tokens in between for text
            return
        before = self._before(ids, cache, noted)
        if before is not None:
            self._noted = self.extended(before, ids.cpu(), call.get("position_ids"))
            self._found = spans_of(self._noted.labels)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", self._cache)
        if cache is not None:
            setattr(cache, NOTED, self._noted)
        self._ids = self._found = self._noted = self._cache = None

    def _before(self, ids: Tensor, cache: Any, noted: Noted | None) -> Noted | None:
        """Return the tokens in a cache before a call; None: not known."""
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0:
            return self.nothing(len(ids))
        if noted is None or noted.tracker != self._number or len(noted.labels) != len(ids):
            return None
        labels = noted.labels[:, :past]
        return replace(noted, labels=pad(labels, (0, past - labels.shape[1]), value=TEXT))

    def nothing(self, rows: int) -> Noted:
        """Return the tokens of an empty cache."""
        none = torch.zeros(rows, 1, dtype=torch.long)
        return Noted(none[:, :0], none, self._number)

    def extended(
        self, before: Noted, ids: Int[Tensor, "b l"], positions: Tensor | None = None
    ) -> Noted:
        """Return the tokens in a cache after a call.

        Args:
            before: tokens before it.
            ids: tokens of the call.
            positions: position ids that the text model gets.
        """
        labels = torch.full_like(ids, TEXT)
        labels[ids == self.tokens.get("image", -1)] = IMAGE
        video = ids == self.tokens.get("video", -1)
        places = places_of(positions, ids)
        # A frame starts after another token, or where height and width start again.
        last = pad(before.labels, (1, 0))[:, -1:]
        starts = ~torch.cat([last > 0, video[:, :-1]], 1)
        starts |= places <= torch.cat([before.place, places[:, :-1]], 1)
        used = pad(before.labels, (1, 0)).amax(1, keepdim=True)
        labels = torch.where(video, (video & starts).cumsum(1) + used, labels)
        return Noted(torch.cat([before.labels, labels], 1), places[:, -1:], self._number)


def places_of(positions: Tensor | None, ids: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """Return numbers that grow from token to token of a frame: its rows, from left to right.

    Positions that are no M-RoPE (time, height, width) do not tell frames apart; a run of video tokens is one then.
    """
    if positions is None or positions.ndim != 3 or len(positions) < 3:
        return torch.arange(1, ids.shape[1] + 1).expand_as(ids)
    height, width = positions[-2:].cpu().expand(2, *ids.shape)
    return height * WIDEST + width


def spans_of(labels: Int[Tensor, "b l"]) -> tuple[Spans, ...]:
    """Return the spans of each row: runs of equal labels other than text."""
    rows = []
    for row in labels:
        values, counts = torch.unique_consecutive(row, return_counts=True)
        ends = counts.cumsum(0)
        runs = zip(values.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        names = ((start, stop, "image" if x == IMAGE else "video") for x, start, stop in runs if x)
        rows.append(tuple(names))
    return tuple(rows)


def cut(spans: Spans, start: int, stop: int) -> Spans:
    """Return the parts of spans that lie in a range, by their place in it."""
    return tuple(
        (max(first, start) - start, min(last, stop) - start, name)
        for first, last, name in spans
        if first < stop and last > start
    )


@contextmanager
def given_spans(model: nn.Module, rows: Sequence[Spans]) -> Iterator[None]:
    """Use these spans for the rows of all calls of an enabled model that cannot find its own; others do nothing."""
    policies = {id(x): x for m in model.modules() if (x := vars(m).get(POLICY)) is not None}
    trackers = [x.tracker for x in policies.values() if x.tracker is not None]
    for tracker in trackers:
        tracker.given = rows
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.given = None


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    if not args:
        return kwargs
    found = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**found.pop("kwargs", {}), **found}
