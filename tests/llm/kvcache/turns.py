"""Questions after a prompt on the hand-written retrieval model, and tokens for tests of selectors."""

import random
from typing import NamedTuple

import torch

from dit_accel import llm
from dit_accel.llm.bench.retrieval import EARLY, PAIRS, key_value
from dit_accel.llm.bench.wired import KEYS, wired_model
from dit_accel.llm.kvcache.cache import KVCache
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import Partial, attention_part
from dit_accel.llm.kvcache.selector import PromptQueries


class Answers(NamedTuple):
    """Shares of right answers that were read from the cache, and the share of the tokens that the last call read."""

    first: float
    """Questions that stood at the end of the prompt, asked again."""
    later: float
    """Questions that came later."""
    read: float


def answers(kv, length: int = 2_000, prompts: int = 2, asked: int = 12) -> Answers:
    """Ask each prompt's own question again, and later ones for keys at its beginning, each in a fork of one cache."""
    model, first, later = llm.enable(wired_model(), kv=kv), [], []
    for seed in range(prompts):
        rng = random.Random(seed)
        question = key_value(length, rng)
        ids = question.ids[: question.positions[0] + 1]
        cache = KVCache(model, kv)
        ask(model, cache, ids)
        again = cache.fork()
        again.crop(-1)
        first.append(ask(model, again, ids[-1:]) == question.answers[0])
        pairs = [(x, ids[i + 1]) for i, x in enumerate(ids[:-1]) if x < KEYS][:PAIRS]
        for key, value in rng.sample([x for x in pairs[:EARLY] if x[0] != ids[-1]], asked):
            fork = cache.fork()
            later.append(ask(model, fork, [key]) == value)
    return Answers(sum(first) / len(first), sum(later) / len(later), fork.read_share)


@torch.inference_mode()
def ask(model, cache, ids: list[int]) -> int:
    """Return the most likely token after these."""
    return int(model(torch.tensor([ids]), past_key_values=cache).logits[0, -1].argmax())


def tokens(count: int, rows: int = 2, heads: int = 2, dim: int = 8, seed: int = 0) -> Part:
    """Return tokens with random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, heads, count, dim, generator=generator) for _ in range(2))
    return Part.of(k, v)


def queries(count: int, rows: int = 2, heads: int = 2, group: int = 3, dim: int = 8, seed: int = 1):
    """Return random queries by the head of keys that they read."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, group, count, dim, generator=generator)


def prompt_of(q, part: Part) -> PromptQueries:
    """Return a prompt of which all tokens are stored."""
    return PromptQueries(q, part.cut(0, 0), part.cut(part.slots))


def read_by_query(q, part: Part, seen, scale: float) -> Partial:
    """Return attention in which each query position reads the tokens that `seen` `[B, H, L, n]` marks."""
    found = [
        attention_part(
            q[:, :, :, i : i + 1], part.k, part.v, scale=scale, visible=seen[:, :, i].contiguous()
        )
        for i in range(q.shape[3])
    ]
    return Partial(torch.cat([x.o for x in found], 3), torch.cat([x.lse for x in found], 3))
