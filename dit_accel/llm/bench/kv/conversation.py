"""`converse`: a session on a cache, turn by turn, with answers, times and bytes."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from dit_accel.llm.bench.kv.session import Session, Turn
from dit_accel.llm.kvcache.cache import KVCache, copied, nbytes_of

MODES = ("single", "multi_turn", "multi_request")
"""single: each question is read with the context, on a cache of its own. multi_turn: a conversation; right answers go
into the cache, whatever the model said. multi_request: the context is read alone and once, each question on a fork."""


@dataclass(frozen=True)
class TurnFigures:
    """One answer and what it cost."""

    right: bool
    first_token_seconds: float
    """Time from the question to the first token; in mode single the context is in it."""
    token_seconds: float
    """Time of each further token."""
    cache_bytes: int
    """Bytes of the cache after the question."""
    tokens: int
    """Tokens that it holds."""
    read_share: float | None
    """Share of the tokens that the calls of this answer read; None: the cache does not count it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def converse(
    model: Any,
    session: Session,
    mode: str,
    *,
    new_cache: Callable[[], Any],
    new_tokens: int = 8,
    decode: Callable[[list[int]], str] | None = None,
) -> list[TurnFigures]:
    """Return the figures of each turn.

    Args:
        model: causal language model, as it is set.
        session: context and questions.
        mode: one of `MODES`.
        new_cache: makes an empty cache.
        new_tokens: tokens that are generated, at least as many as the answer has.
        decode: turns tokens into text, for turns that have one.
    """
    cache = new_cache()
    if mode == "multi_request":
        _read(model, session.context, cache)
    before, found = session.context if mode == "multi_turn" else [], []
    for turn in session.turns:
        if mode == "single":
            cache, before = new_cache(), session.context
        question = [*before, *turn.question]
        if mode == "multi_request":
            found.append(_answer(model, copied(cache), question, turn, new_tokens, decode))
            continue
        found.append(
            _answer(model, cache, question, turn, new_tokens, decode, keep=mode == "multi_turn")
        )
        before = turn.answer
    return found


def _answer(
    model: Any,
    cache: Any,
    question: list[int],
    turn: Turn,
    new_tokens: int,
    decode: Callable[[list[int]], str] | None,
    keep: bool = False,
) -> TurnFigures:
    """Return the figures of an answer; with `keep`, the cache holds the question afterwards, but not the answer."""
    start = time.perf_counter()
    said = [_read(model, question, cache)]
    first = time.perf_counter() - start
    size, tokens = nbytes_of(cache), cache.get_seq_length()
    working = copied(cache) if keep else cache
    count = max(new_tokens, len(turn.answer))
    reads = _reads(working)
    start = time.perf_counter()
    for _ in range(count - 1):
        said.append(_read(model, said[-1:], working))
    each = (time.perf_counter() - start) / max(1, count - 1)
    if turn.text is None or decode is None:
        right = said[: len(turn.answer)] == turn.answer
    else:
        right = turn.text in decode(said)
    calls, share = (b - a for a, b in zip(reads, _reads(working), strict=True))
    return TurnFigures(right, first, each, size, tokens, share / calls if calls else None)


def _read(model: Any, ids: list[int], cache: Any) -> int:
    """Return the most likely token after these."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def _reads(cache: Any) -> tuple[int, float]:
    """Return calls and shares of a cache so far, added up over layers."""
    return cache.reads if isinstance(cache, KVCache) else (0, 0.0)


def own_cache(model: Any) -> DynamicCache:
    """Return an empty cache of transformers."""
    return DynamicCache(config=model.config)
