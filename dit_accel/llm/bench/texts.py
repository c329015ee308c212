"""Texts for benchmarks that are part of every Python installation: its documentation (prose) and library source (code)."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

MODULES = ("argparse", "inspect", "typing", "tarfile", "turtle", "dataclasses", "shutil", "zipfile")
"""Library modules whose source makes up the text "code"."""
START = 20_000
"""Number of characters to skip at the beginning of the built-in texts."""


def prose() -> str:
    """Return the Python language reference that `help()` shows.

    Raises:
        ValueError: the Python installation has no `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "text='prose': this Python has no pydoc_data; pass 'code' or the path of a text file"
        ) from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def code() -> str:
    """Return the concatenated source of some modules of the standard library.

    Raises:
        ValueError: the Python installation has no source files.
    """
    parts = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            parts.append(Path(spec.origin).read_text(encoding="utf-8"))
    if not parts:
        raise ValueError(
            "text='code': this Python has no sources; pass 'prose' or the path of a text file"
        )
    return "\n\n".join(parts)


TEXTS = {"prose": prose, "code": code}


def read_text(name: str) -> str:
    """Return a text by name or path.

    Args:
        name: "prose", "code", or the path of a text file in UTF-8. The built-in texts start at character `START`.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    if name in TEXTS:
        return TEXTS[name]()[START:]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"text={name!r}: cannot be read ({reason}); must be {', '.join(TEXTS)}, or a text file in UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"text={name!r}: the file must not be empty")
    return text


def text_hash(text: str) -> str:
    """Return a short hash of a text, because the built-in texts differ between Python versions."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_ids(
    tokenizer: Any, names: Sequence[str], length: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the first token ids `[1, length]` and the hash of each text, by name.

    Raises:
        ValueError: a text cannot be read or is too short.
    """
    ids, hashes = {}, {}
    for name in names:
        text = read_text(name)[: 40 * length]
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, :length]
        if tokens.shape[1] < length:
            raise ValueError(
                f"length={length}: the text {name!r} has only {tokens.shape[1]} tokens; must have at least {length}"
            )
        ids[name], hashes[name] = tokens.long(), text_hash(text)
    return ids, hashes
