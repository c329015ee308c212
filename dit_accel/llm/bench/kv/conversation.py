"""`converse`: runs a session on a KV cache turn by turn, and measures answers, times and bytes."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from dit_accel.llm.bench.kv.session import Session, Turn
from dit_accel.llm.kvcache.cache import KVCache, copied, nbytes_of

MODES = ("single", "multi_turn", "multi_request")
"""single: each question is processed together with the context, on a new cache. multi_turn: one conversation on one cache;
expected answers go into the cache, whatever the model generated. multi_request: the context is processed once, and each
question on a fork of the cache."""


@dataclass(frozen=True)
class TurnResult:
    """Correctness, time and memory of one answer."""

    right: bool
    first_token_seconds: float
    """Seconds from the question to the first token; in mode single this includes the context."""
    token_seconds: float
    """Seconds per further token."""
    cache_bytes: int
    """Bytes of the cache after the question."""
    tokens: int
    """Number of tokens in the cache after the question."""
    read_share: float | None
    """Mean share of the cached tokens that the calls of this answer read; None if the cache does not count reads."""

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
) -> list[TurnResult]:
    """Run a session and return the result of each turn.

    Args:
        model: causal language model with its current settings.
        session: context and questions.
        mode: one of `MODES`.
        new_cache: function that returns an empty cache.
        new_tokens: number of generated tokens, raised to the length of the answer.
        decode: function that decodes tokens to text, for turns with a text answer.
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
) -> TurnResult:
    """Return the result of one question. With `keep`, the cache contains the question afterwards, but not the answer."""
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
    return TurnResult(right, first, each, size, tokens, share / calls if calls else None)


def _read(model: Any, ids: list[int], cache: Any) -> int:
    """Process tokens and return the most likely next token."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def _reads(cache: Any) -> tuple[int, float]:
    """Return the numbers of calls and the sum of read shares of a cache so far, over all layers."""
    return cache.reads if isinstance(cache, KVCache) else (0, 0.0)


def own_cache(model: Any) -> DynamicCache:
    """Return an empty `DynamicCache` of transformers."""
    return DynamicCache(config=model.config)
