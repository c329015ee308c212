"""Retrieval tasks for the handwritten model, and its accuracy on them."""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dit_accel.llm.bench.wired import FIRST_VALUE, KEYS, START, VALUES
from dit_accel.llm.prefill import Spans
from dit_accel.llm.spans import given_spans

PAIRS = 100
"""Number of assignments in a prompt."""
EARLY = 2 * PAIRS // 3
"""Only the first EARLY assignments are asked for, which in long prompts are outside of a sliding window."""
LEAD = 128
"""Number of noise tokens at the beginning, so that patterns that always read the first keys find no answer there."""
ASKED = 4
"""Number of keys that a `multi_needle` prompt asks for."""
HOPS = 4
"""Number of assignments in a chain of `variable_tracing`."""
FRAME = 49
"""Number of tokens per video frame in `video_needle`, deliberately not a multiple of a block."""


@dataclass(frozen=True)
class Question:
    """Prompt with the expected next token at some of its positions."""

    ids: list[int]
    positions: list[int]
    answers: list[int]
    """Expected next token at each position."""
    spans: Spans = ()
    """Frames of the video in the prompt."""


def key_value(length: int, rng: random.Random) -> Question:
    """Return a prompt of assignments in noise that ends with a key. The answer is the value of the key."""
    return _asked(length, rng, 1)


def multi_needle(length: int, rng: random.Random) -> Question:
    """Return a prompt that ends with several keys, each followed by noise. The answers are the values of all keys."""
    return _asked(length, rng, ASKED)


def middle(length: int, rng: random.Random) -> Question:
    """Return a prompt that asks for keys at two thirds of its length.

    Most patterns let the last queries read every key, but not the queries at this position.
    """
    keys = rng.sample(range(KEYS), PAIRS)
    values = [noise(rng) for _ in keys]
    first = 2 * length // 3
    body = scattered(list(zip(keys, values, strict=True)), first - 1, rng)
    asked = rng.sample(range(EARLY), ASKED)
    ids, positions, answers = [START, *body], [], []
    for i in asked:
        positions.append(len(ids))
        answers.append(values[i])
        ids += [keys[i], noise(rng)]
    ids += [noise(rng) for _ in range(length - len(ids))]
    return Question(ids, positions, answers)


def variable_tracing(length: int, rng: random.Random) -> Question:
    """Return a prompt of chains "a = ref b", "b = ref c", "c = value" that ends by following one of the chains.

    The answers are the references and the value, as greedy decoding would produce them.
    """
    keys = rng.sample(range(KEYS), PAIRS)
    pairs = []
    for start in range(0, PAIRS, HOPS):
        chain = keys[start : start + HOPS]
        pairs += [(a, KEYS + b) for a, b in pairwise(chain)]
        pairs.append((chain[-1], noise(rng)))
    first = HOPS * rng.randrange(PAIRS // HOPS)
    walk = [pairs[first][0], *(y for _, y in pairs[first : first + HOPS])]
    rng.shuffle(pairs)
    body = scattered(pairs, length - HOPS - 1, rng)
    ids = [START, *body, *walk[:-1]]
    return Question(ids, list(range(len(ids) - HOPS, len(ids))), walk[1:])


def video_needle(length: int, rng: random.Random, depth: float | None = None) -> Question:
    """Return a video with an assignment hidden in one frame, followed by text that ends with its key (as in VisionNIAH).

    Args:
        length: number of tokens of the prompt; two thirds of them are the video.
        rng: random number generator.
        depth: relative position of the frame in the video, from 0 to 1. Default: random.
    """
    count = (2 * length // 3 - LEAD) // FRAME
    ids = [START, *(noise(rng) for _ in range(length - 1))]
    frame = round((rng.random() if depth is None else depth) * (count - 1))
    key, value = rng.randrange(KEYS), noise(rng)
    at = LEAD + frame * FRAME + rng.randrange(FRAME - 1)
    ids[at : at + 2] = [key, value]
    ids[-1] = key
    starts = range(LEAD, LEAD + count * FRAME, FRAME)
    spans = tuple((start, start + FRAME, "video") for start in starts)
    return Question(ids, [length - 1], [value], spans)


TASKS = {
    "key_value": key_value,
    "multi_needle": multi_needle,
    "variable_tracing": variable_tracing,
    "middle": middle,
    "video_needle": video_needle,
}
MIN_LENGTH = 8 * PAIRS
"""Smallest number of tokens of a prompt."""


@torch.inference_mode()
def accuracy(model: Any, task: str, length: int, *, prompts: int = 8, seed: int = 0) -> float:
    """Return the share of prompts in which all answers are the most likely next tokens.

    Args:
        model: model from `wired_model()`, enabled or not.
        task: name in `TASKS`.
        length: number of tokens per prompt.
        prompts: number of prompts.
        seed: random seed of the prompts.

    Raises:
        ValueError: the task is unknown, or `length` is too small.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    if length < MIN_LENGTH:
        raise ValueError(f"length={length}: must be an int >= {MIN_LENGTH}")
    rng = random.Random(f"{task} {length} {seed}")
    right = 0
    for _ in range(prompts):
        question = TASKS[task](length, rng)
        with given_spans(model, [question.spans]):
            logits = model(torch.tensor([question.ids]), use_cache=False).logits[0]
        found = logits[question.positions].argmax(-1).tolist()
        right += found == question.answers
    return right / prompts


def _asked(length: int, rng: random.Random, count: int) -> Question:
    keys = rng.sample(range(KEYS), PAIRS)
    values = [noise(rng) for _ in keys]
    body = scattered(list(zip(keys, values, strict=True)), length - 2 * count, rng)
    ids, positions, answers = [START, *body], [], []
    for i in rng.sample(range(EARLY), count):
        positions.append(len(ids))
        answers.append(values[i])
        ids += [keys[i], noise(rng)]
    return Question(ids[:length], positions, answers)


def scattered(pairs: list[tuple[int, int]], length: int, rng: random.Random) -> list[int]:
    """Return `length` noise tokens with the pairs inserted in order at random places."""
    gaps = sorted(rng.randrange(LEAD, length - 2 * len(pairs) + 1) for _ in pairs)
    ids: list[int] = []
    for i, (gap, pair) in enumerate(zip(gaps, pairs, strict=True)):
        ids += [noise(rng) for _ in range(gap + 2 * i - len(ids))]
        ids += pair
    return ids + [noise(rng) for _ in range(length - len(ids))]


def noise(rng: random.Random) -> int:
    """Return a random noise token, which is also used as a value."""
    return FIRST_VALUE + rng.randrange(VALUES)
