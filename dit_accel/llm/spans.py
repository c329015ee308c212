"""Token spans of images and video frames in the prompts of a multimodal model, found by hooks on the model."""

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

LABELS = "_dit_accel_spans"
"""Name of the attribute of a KV cache that holds its `TokenLabels`. Copies of the cache keep it."""
TEXT, IMAGE = 0, -1
"""Labels of text and image tokens. Video frames are labelled 1, 2, ..."""
WIDEST = 2**20
"""Upper bound of positions, used to combine height and width into one number."""
_numbers = count()


@dataclass(frozen=True)
class TokenLabels:
    """Modality labels of the tokens in a KV cache."""

    labels: Int[Tensor, "b l"]
    place: Int[Tensor, "b 1"]
    """Position of the last token in its frame, see `places_of`."""
    tracker: int
    """Number of the tracker that wrote the labels. Another tracker may have missed calls, so it does not use them."""


class SpanTracker:
    """Finds image and video spans from the token ids of each call, and remembers the spans of cached tokens.

    Video frames are separated by the height and width positions of their tokens (M-RoPE). The grid sizes of the videos
    would also tell, but `generate` does not pass them to the model in every call.

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
        """Spans of the batch rows that replace the spans found in the prompts, see `given_spans`."""
        self._ids: Tensor | None = None
        self._found: Sequence[Spans] | None = None
        self._noted: TokenLabels | None = None
        self._cache: Any = None
        self._number = next(_numbers)
        self._handles: list[Any] = []

    @property
    def multimodal(self) -> bool:
        """True if the model has token ids for images or videos."""
        return bool(self.tokens)

    @property
    def rows(self) -> Sequence[Spans] | None:
        """Spans of each batch row of the current call, including cached tokens; None if not known."""
        return self._found if self.given is None else self.given

    def attach(self, model: Any) -> None:
        """Add hooks to a multimodal model that read its token ids and the position ids of its text model."""
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
        if self._ids is None:  # called with inputs_embeds: the token ids are not known
            return
        ids, call = self._ids, _arguments(module, args, kwargs)
        self._cache = cache = call.get("past_key_values")
        noted = getattr(cache, LABELS, None)
        if noted is not None and ids.shape[1] == 1:
            self._noted = noted  # decoding: generated tokens count as text in the next prompt
            return
        before = self._before(ids, cache, noted)
        if before is not None:
            self._noted = self.extended(before, ids.cpu(), call.get("position_ids"))
            self._found = spans_of(self._noted.labels)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", self._cache)
        if cache is not None:
            setattr(cache, LABELS, self._noted)
        self._ids = self._found = self._noted = self._cache = None

    def _before(self, ids: Tensor, cache: Any, noted: TokenLabels | None) -> TokenLabels | None:
        """Return the labels of the tokens that are in the cache before a call; None if not known."""
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0:
            return self.nothing(len(ids))
        if noted is None or noted.tracker != self._number or len(noted.labels) != len(ids):
            return None
        labels = noted.labels[:, :past]
        return replace(noted, labels=pad(labels, (0, past - labels.shape[1]), value=TEXT))

    def nothing(self, rows: int) -> TokenLabels:
        """Return the labels of an empty cache."""
        none = torch.zeros(rows, 1, dtype=torch.long)
        return TokenLabels(none[:, :0], none, self._number)

    def extended(
        self, before: TokenLabels, ids: Int[Tensor, "b l"], positions: Tensor | None = None
    ) -> TokenLabels:
        """Return the labels of the tokens that are in the cache after a call.

        Args:
            before: labels before the call.
            ids: token ids of the call.
            positions: position ids that the text model gets.
        """
        labels = torch.full_like(ids, TEXT)
        labels[ids == self.tokens.get("image", -1)] = IMAGE
        video = ids == self.tokens.get("video", -1)
        places = places_of(positions, ids)
        # A frame starts after a non-video token, or where the height and width positions restart.
        last = pad(before.labels, (1, 0))[:, -1:]
        starts = ~torch.cat([last > 0, video[:, :-1]], 1)
        starts |= places <= torch.cat([before.place, places[:, :-1]], 1)
        used = pad(before.labels, (1, 0)).amax(1, keepdim=True)
        labels = torch.where(video, (video & starts).cumsum(1) + used, labels)
        return TokenLabels(torch.cat([before.labels, labels], 1), places[:, -1:], self._number)


def places_of(positions: Tensor | None, ids: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """Return numbers that increase from token to token within a frame (row by row, left to right).

    Without M-RoPE positions (time, height, width), frames cannot be separated, and a run of video tokens is one frame.
    """
    if positions is None or positions.ndim != 3 or len(positions) < 3:
        return torch.arange(1, ids.shape[1] + 1).expand_as(ids)
    height, width = positions[-2:].cpu().expand(2, *ids.shape)
    return height * WIDEST + width


def spans_of(labels: Int[Tensor, "b l"]) -> tuple[Spans, ...]:
    """Return the spans of each batch row: runs of equal labels, except text."""
    rows = []
    for row in labels:
        values, counts = torch.unique_consecutive(row, return_counts=True)
        ends = counts.cumsum(0)
        runs = zip(values.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        names = ((start, stop, "image" if x == IMAGE else "video") for x, start, stop in runs if x)
        rows.append(tuple(names))
    return tuple(rows)


def cut(spans: Spans, start: int, stop: int) -> Spans:
    """Return the parts of spans inside a token range, relative to the start of the range."""
    return tuple(
        (max(first, start) - start, min(last, stop) - start, name)
        for first, last, name in spans
        if first < stop and last > start
    )


@contextmanager
def given_spans(model: nn.Module, rows: Sequence[Spans]) -> Iterator[None]:
    """Context manager that sets the spans of the batch rows for an enabled model, instead of finding them in its prompts.

    It has no effect on a model without a `SpanTracker`.

    Args:
        model: model.
        rows: spans of each batch row.
    """
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
    """Return all arguments of a module call by name."""
    if not args:
        return kwargs
    found = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**found.pop("kwargs", {}), **found}
