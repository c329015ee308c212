"""Passkey task: a five-digit number is hidden in a long text, and the model must repeat it."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.llm.bench.texts import TEXTS, read_text

QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """Passkey prompt and the expected answer."""

    ids: list[int]
    answer: list[int]
    digits: str


@dataclass(frozen=True)
class PasskeyScore:
    """Accuracy of a model on passkey prompts."""

    exact: int
    """Number of prompts in which greedy decoding gives the complete answer."""
    prompts: int
    token_accuracy: float
    """Share of the answer tokens that are the most likely next token."""


def make_passkeys(tokenizer: Any, length: int, count: int, seed: int = 0) -> list[Passkey]:
    """Return prompts with passkeys at depths spread over the text.

    Args:
        tokenizer: tokenizer of transformers.
        length: number of tokens of a prompt and its answer.
        count: number of prompts.
        seed: random seed of passkeys and texts.

    Raises:
        ValueError: `length` is too small for the question, or larger than a text.
    """
    rng = random.Random(f"passkey {length} {seed}")
    hays = [_tokens(tokenizer, read_text(name)[: 40 * length]) for name in TEXTS]
    made = []
    for i in range(count):
        digits = str(rng.randint(10_000, 99_999))
        needle = _tokens(
            tokenizer,
            f"\n\nThe pass key is {digits}. Remember it. {digits} is the pass key.\n\n",
        )
        question, answer = _tokens(tokenizer, QUESTION), _tokens(tokenizer, f" {digits}")
        room = length - len(needle) - len(question) - len(answer)
        hay = hays[i % len(hays)]
        if room < 1 or len(hay) < room:
            raise ValueError(
                f"length={length}: must be in [{length - room + 1}, {len(hay)}] for passkeys"
            )
        start = rng.randrange(len(hay) - room + 1)
        body = hay[start : start + room]
        depth = int(room * (0.05 + 0.9 * (i + 0.5) / count))
        ids = body[:depth] + needle + body[depth:] + question
        made.append(Passkey(ids, answer, digits))
    return made


@torch.inference_mode()
def score_passkeys(model: Any, passkeys: list[Passkey]) -> PasskeyScore:
    """Return the accuracy of a model on passkey prompts, with its current attention settings."""
    exact, hits, total = 0, 0, 0
    for passkey in passkeys:
        ids = torch.tensor([passkey.ids + passkey.answer[:-1]], device=model.device)
        count = len(passkey.answer)
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=count).logits[0]
        right = logits.argmax(-1).tolist()
        good = sum(a == b for a, b in zip(right, passkey.answer, strict=True))
        exact, hits, total = exact + (good == count), hits + good, total + count
    return PasskeyScore(exact, len(passkeys), hits / max(1, total))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
