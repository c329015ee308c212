"""`Session`: context and questions as tokens, and reading of sessions from files (SCBench, arXiv 2412.10319)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Turn:
    """Question and expected answer, as tokens."""

    question: list[int]
    answer: list[int]
    """Expected tokens. Later turns of a conversation read them instead of the generated tokens."""
    text: str | None = None
    """Text that the generated answer must contain; None: the generated tokens must equal `answer`."""


@dataclass(frozen=True)
class Session:
    """Context and questions about it, as tokens."""

    context: list[int]
    turns: list[Turn]

    @property
    def length(self) -> int:
        """Number of tokens in the context, all questions and all answers."""
        return len(self.context) + sum(len(x.question) + len(x.answer) for x in self.turns)


@dataclass(frozen=True)
class TextSession:
    """Context and questions about it, as text."""

    context: str
    turns: tuple[tuple[str, str], ...]
    """Pairs of question and answer."""


def tokenized(text: TextSession, tokenizer: Any) -> Session:
    """Return the tokenized session."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    turns = [Turn(ids(question), ids(answer), answer.strip()) for question, answer in text.turns]
    return Session(ids(text.context), turns)


def read_sessions(path: Path) -> list[TextSession]:
    """Return the sessions of a JSONL file in the format of SCBench.

    Each line is `{"context": ..., "multi_turns": [{"input": ..., "answer": ...}, ...]}`. If an answer is a list, its first
    element is used.

    Raises:
        ValueError: the file cannot be read, or a line has another format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"sessions={str(path)!r}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_parsed(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"sessions={str(path)!r}, line {number}: {type(error).__name__} {error}; must be "
                    '{"context": ..., "multi_turns": [{"input": ..., "answer": ...}]}'
                ) from None
    if not found:
        raise ValueError(f"sessions={str(path)!r}: the file is empty")
    return found


def _parsed(data: Any) -> TextSession:
    turns = []
    for turn in data["multi_turns"]:
        answer = turn["answer"]
        answer = answer[0] if isinstance(answer, list) else answer
        turns.append((str(turn["input"]), str(answer)))
    if not turns:
        raise ValueError("multi_turns is empty")
    return TextSession(str(data["context"]), tuple(turns))
