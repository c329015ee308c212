"""Conversion of text to file names that are safe on every operating system."""

import re
import unicodedata
from collections.abc import Iterable

MAX_BYTES = 180
"""Maximum length of a name in UTF-8. File systems allow 255 bytes; the rest is for suffixes and temporary names."""
_FORBIDDEN = re.compile(r'[/\\:*?"<>|]')
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\s*\..*)?", re.IGNORECASE)
_END = re.compile(r"[\s.]+$")
"""Dots and spaces at the end of a name, which Windows drops."""
_SUFFIX = re.compile(r"\.(?=(png|jpe?g|webp|gif|mp4|jsonl?|tmp)$)", re.IGNORECASE)


def name_key(name: str) -> str:
    """Return a key that is equal for names that some file systems do not distinguish: case and Unicode normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def safe_name(text: str, *, ending: str = "", max_bytes: int = MAX_BYTES) -> str:
    """Return `text` + `ending` as a safe file name. A name that is already safe is not changed.

    The result has no separators, control characters or invisible characters, no leading dot, and no trailing dot or space.
    It is not a device name of Windows and has no suffix of a media file (`x.mp4` would collide with the clip of `x`). It
    has 1 to `max_bytes` bytes; if the text is too long, the text is cut and `ending` is kept. Different texts can give
    the same name, see `unique_names`.
    """
    name = unicodedata.normalize("NFC", text)
    # Cc control, Cf format (direction overrides), Cs lone surrogates, Zl and Zp line separators.
    name = "".join(
        "_" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in name
    )
    name = _FORBIDDEN.sub("_", name).strip()
    if name.startswith("."):
        name = "_" + name[1:]
    room = max_bytes - len(ending.encode())
    name = _cut(name, room)
    if _DEVICES.fullmatch(_END.sub("", name + ending)):  # the cut can leave a device name
        name = _cut("_" + name, room)
    return _SUFFIX.sub("_", _END.sub("", name + ending)) or "_"


def unique_names(
    texts: Iterable[str],
    *,
    ending: str = "",
    max_bytes: int = MAX_BYTES,
    fold_case: bool = True,
) -> list[str]:
    """Return a different `safe_name` for each text. Duplicates get "-2", "-3", ... before `ending`.

    Args:
        texts: texts of the names.
        ending: end of every name.
        max_bytes: maximum length of a name in UTF-8.
        fold_case: treat names that differ only in case as duplicates, as Windows and macOS do.
    """
    key = name_key if fold_case else str
    taken: set[str] = set()
    tried: dict[str, int] = {}
    names = []
    for text in texts:
        name = plain = safe_name(text, ending=ending, max_bytes=max_bytes)
        number = tried.get(key(plain), 1)
        while key(name) in taken:
            number += 1
            name = safe_name(text, ending=f"-{number}{ending}", max_bytes=max_bytes)
        tried[key(plain)] = number
        taken.add(key(name))
        names.append(name)
    return names


def _cut(name: str, max_bytes: int) -> str:
    """Cut the name to at most `max_bytes` bytes of UTF-8 without splitting a character."""
    return name.encode()[:max_bytes].decode(errors="ignore")
