"""Text sessions for any language model, modelled on the synthetic tasks of SCBench (arXiv 2412.10319)."""

import random
import string
from collections.abc import Callable
from itertools import pairwise

from dit_accel.llm.bench.kv.session import TextSession
from dit_accel.llm.bench.texts import TEXTS, read_text


def passkey(size: int, turns: int, rng: random.Random) -> TextSession:
    """Return a text with hidden numbers. Each question asks for one of them."""
    text = read_text(rng.choice(sorted(TEXTS)))
    start = rng.randrange(max(1, len(text) - size))
    names = rng.sample(COLOURS, turns)
    keys = {name: str(rng.randint(10_000, 99_999)) for name in names}
    body = text[start : start + size]
    step = len(body) // (turns + 1)
    pieces = [body[i * step : (i + 1) * step] for i in range(turns + 1)]
    for i, (name, key) in enumerate(keys.items()):
        pieces[i] += (
            f"\n\nThe {name} pass key is {key}. Remember it. {key} is the {name} pass key.\n\n"
        )
    asked = [
        (f"\n\nWhat is the {name} pass key? The {name} pass key is", f" {keys[name]}")
        for name in names
    ]
    rng.shuffle(asked)
    return TextSession("".join(pieces), tuple(asked))


def key_value(size: int, turns: int, rng: random.Random) -> TextSession:
    """Return lines of keys and values. Each question asks for the value of a key."""
    pairs = [(_word(rng, 8), _word(rng, 8)) for _ in range(max(turns, size // 24))]
    body = "\n".join(f"{key}: {value}" for key, value in pairs)
    asked = [
        (f"\n\nThe value of {key} is: {key}:", f" {value}")
        for key, value in rng.sample(pairs, turns)
    ]
    return TextSession(f"Keys and their values:\n{body}\n", tuple(asked))


def prefix_suffix(size: int, turns: int, rng: random.Random) -> TextSession:
    """Return lines of random letters. Each question gives the beginning and the end of a line; the answer is its middle."""
    lines = [[_word(rng, 6) for _ in range(3)] for _ in range(max(turns, size // 22))]
    body = "\n".join(" ".join(x) for x in lines)
    asked = [
        (f"\n\nThe line that begins with {a} and ends with {c} is: {a}", f" {b}")
        for a, b, c in rng.sample(lines, turns)
    ]
    return TextSession(f"Lines:\n{body}\n", tuple(asked))


def variable_tracing(size: int, turns: int, rng: random.Random) -> TextSession:
    """Return assignments between variables. Each question asks for the number at the end of a chain."""
    names = [_word(rng, 4).upper() for _ in range(max(4 * turns, size // 20))]
    names = list(dict.fromkeys(names))
    chains = [names[i : i + 4] for i in range(0, len(names) - 3, 4)]
    lines, asked = [], []
    for chain in chains:
        number = rng.randint(100, 999)
        lines += [f"VAR {chain[0]} = {number}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(chain))]
        asked.append((f"\n\nThe number that VAR {chain[-1]} has is", f" {number}"))
    return TextSession("\n".join(lines) + "\n", tuple(rng.sample(asked, turns)))


def math_find(size: int, turns: int, rng: random.Random) -> TextSession:
    """Return a list of numbers. Questions ask for the largest, smallest, first and last number."""
    numbers = rng.sample(range(1_000, 100_000), max(8, size // 7))
    asked = [
        ("\n\nThe largest number of the list is", f" {max(numbers)}"),
        ("\n\nThe smallest number of the list is", f" {min(numbers)}"),
        ("\n\nThe first number of the list is", f" {numbers[0]}"),
        ("\n\nThe last number of the list is", f" {numbers[-1]}"),
    ]
    return TextSession(f"A list: {', '.join(map(str, numbers))}\n", tuple((asked * turns)[:turns]))


def many_shot(size: int, turns: int, rng: random.Random) -> TextSession:
    """Return example words with made-up classes. Each question asks for the class of one of the words."""
    classes = [_word(rng, 5) for _ in range(6)]
    kinds = {_word(rng, 6): rng.choice(classes) for _ in range(max(turns, size // 28))}
    lines = [f"Word: {word} Class: {kind}" for word, kind in kinds.items()]
    asked = [
        (f"\nWord: {word} Class:", f" {kinds[word]}") for word in rng.sample(sorted(kinds), turns)
    ]
    return TextSession("\n".join(lines) + "\n", tuple(asked))


COLOURS = [
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "brown",
    "grey",
    "pink",
    "purple",
    "orange",
    "golden",
    "silver",
    "violet",
    "crimson",
    "amber",
]
TASKS: dict[str, Callable[[int, int, random.Random], TextSession]] = {
    "passkey": passkey,
    "key_value": key_value,
    "prefix_suffix": prefix_suffix,
    "variable_tracing": variable_tracing,
    "math_find": math_find,
    "many_shot": many_shot,
}
"""Functions of the context size in characters, the number of questions, and a random number generator."""


def _word(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))
