"""`Session`: a context and questions about it, as tokens, and how they are read from files (SCBench, arXiv 2412.10319)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: list[int]
    answer: list[int]
    """Tokens that the model should say; later turns of a conversation read it, whatever the model said."""
    text: str | None = None
    """Text that an answer in words must contain; None: the tokens must be those of `answer`."""


@dataclass(frozen=True)
class Session:
    """Questions about one context."""

    context: list[int]
    turns: list[Turn]

    @property
    def length(self) -> int:
        """Tokens of the context, all questions and answers."""
        return len(self.context) + sum(len(x.question) + len(x.answer) for x in self.turns)


@dataclass(frozen=True)
class Words:
    """A session in words."""

    context: str
    turns: tuple[tuple[str, str], ...]
    """Questions and answers."""


def tokenized(words: Words, tokenizer: Any) -> Session:
    """Return a session in the tokens of a model."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    turns = [Turn(ids(question), ids(answer), answer.strip()) for question, answer in words.turns]
    return Session(ids(words.context), turns)


def read_sessions(path: Path) -> list[Words]:
    """Return the sessions of a JSONL file in the form of SCBench.

    Each line is `{"context": ..., "multi_turns": [{"input": ..., "answer": ...}, ...]}`. Of several answers that are
    right the first one counts.

    Raises:
        ValueError: the file cannot be read or has another form; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"sessions={str(path)!r}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_words(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"sessions={str(path)!r}, line {number}: {type(error).__name__} {error}; accepted is "
                    '{"context": ..., "multi_turns": [{"input": ..., "answer": ...}]}'
                ) from None
    if not found:
        raise ValueError(f"sessions={str(path)!r}: the file is empty")
    return found


def _words(data: Any) -> Words:
    turns = []
    for turn in data["multi_turns"]:
        answer = turn["answer"]
        answer = answer[0] if isinstance(answer, list) else answer
        turns.append((str(turn["input"]), str(answer)))
    if not turns:
        raise ValueError("multi_turns is empty")
    return Words(str(data["context"]), tuple(turns))
