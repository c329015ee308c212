"""Real texts that come with every Python: its documentation (prose) and modules of its library (code)."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

MODULES = ("argparse", "inspect", "typing", "tarfile", "turtle", "dataclasses", "shutil", "zipfile")
"""Modules whose source is the code."""
START = 20_000
"""Characters that are skipped: window of a text that is not its opening."""


def prose() -> str:
    """Return the language reference as `help()` shows it.

    Raises:
        ValueError: this Python came without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "text='prose': this Python has no pydoc_data; accepted is 'code' or the path of a text file"
        ) from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def code() -> str:
    """Return the source of some modules of the standard library, one after another.

    Raises:
        ValueError: this Python came without sources.
    """
    parts = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            parts.append(Path(spec.origin).read_text(encoding="utf-8"))
    if not parts:
        raise ValueError(
            "text='code': this Python has no sources; accepted is 'prose' or the path of a text file"
        )
    return "\n\n".join(parts)


TEXTS = {"prose": prose, "code": code}


def read_text(name: str) -> str:
    """Return a text.

    Args:
        name: "prose", "code", or the path of a text file in UTF-8. Built-in texts start at character `START`.

    Raises:
        ValueError: no such text, or it is empty.
    """
    if name in TEXTS:
        return TEXTS[name]()[START:]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"text={name!r}: cannot be read ({reason}); accepted are {', '.join(TEXTS)}, or a text file in UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"text={name!r}: the file is empty; accepted is a text")
    return text


def fingerprint(text: str) -> str:
    """Return a short hash: two versions of Python have different texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_ids(
    tokenizer: Any, names: Sequence[str], length: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the first tokens `[1, length]` of texts, and their fingerprints, by name.

    Raises:
        ValueError: a text cannot be read or is too short.
    """
    ids, hashes = {}, {}
    for name in names:
        text = read_text(name)[: 40 * length]
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, :length]
        if tokens.shape[1] < length:
            raise ValueError(
                f"length={length}: the text {name!r} has {tokens.shape[1]} tokens; accepted are texts of at least length "
                "tokens"
            )
        ids[name], hashes[name] = tokens.long(), fingerprint(text)
    return ids, hashes
