"""Sessions for the handwritten model. Questions are single tokens; answers are tokens or chains of tokens."""

import random

from dit_accel.llm.bench import retrieval
from dit_accel.llm.bench.kv.session import Session, Turn
from dit_accel.llm.bench.wired import KEYS, START


def key_value(length: int, turns: int, rng: random.Random) -> Session:
    """Return a context of assignments in noise. Each question is a key, and the answer is its value."""
    keys = rng.sample(range(KEYS), retrieval.PAIRS)
    values = [retrieval.noise(rng) for _ in keys]
    body = retrieval.scattered(list(zip(keys, values, strict=True)), length - 1, rng)
    asked = rng.sample(range(retrieval.EARLY), turns)
    return Session([START, *body], [Turn([keys[i]], [values[i]]) for i in asked])


def variable_tracing(length: int, turns: int, rng: random.Random) -> Session:
    """Return a context of chains "a = ref b", ..., "d = value". Each question is a first name, and the answer is its chain."""
    hops, keys = retrieval.HOPS, rng.sample(range(KEYS), retrieval.PAIRS)
    pairs, chains = [], []
    for start in range(0, retrieval.PAIRS, hops):
        names = keys[start : start + hops]
        said = [*(KEYS + x for x in names[1:]), retrieval.noise(rng)]
        pairs += list(zip(names, said, strict=True))
        chains.append(Turn(names[:1], said))
    rng.shuffle(pairs)
    body = retrieval.scattered(pairs, length - 1, rng)
    return Session([START, *body], rng.sample(chains, turns))


TASKS = {"key_value": key_value, "variable_tracing": variable_tracing}
