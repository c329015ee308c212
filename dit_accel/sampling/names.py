"""Text to file names that are safe on every system."""

import re
import unicodedata
from collections.abc import Iterable

MAX_BYTES = 180
"""Of a name in UTF-8: file systems stop at 255, and suffixes and temporary names need room."""
_FORBIDDEN = re.compile(r'[/\\:*?"<>|]')
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\s*\..*)?", re.IGNORECASE)
_END = re.compile(r"[\s.]+$")
"""Windows drops dots and spaces at the end."""
_SUFFIX = re.compile(r"\.(?=(png|jpe?g|webp|gif|mp4|jsonl?|tmp)$)", re.IGNORECASE)


def name_key(name: str) -> str:
    """Return a key that is equal for names that some file system takes for one: case, and how accents are stored."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def safe_name(text: str, *, ending: str = "", max_bytes: int = MAX_BYTES) -> str:
    """Return a file name that reads like `text` + `ending`; what is safe already stays as it is.

    No separators, control or invisible characters, no leading dot or trailing dot or space (of any
    kind), no device name of Windows, no suffix of a media file (`x.mp4` would meet the clip of `x`), at
    most `max_bytes` bytes, never empty; where the text is cut, `ending` stays. A safe name has itself as
    its safe name. Different texts can get one name: see `unique_names`.
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
    if _DEVICES.fullmatch(_END.sub("", name + ending)):  # cutting can uncover one
        name = _cut("_" + name, room)
    return _SUFFIX.sub("_", _END.sub("", name + ending)) or "_"


def unique_names(
    texts: Iterable[str],
    *,
    ending: str = "",
    max_bytes: int = MAX_BYTES,
    fold_case: bool = True,
) -> list[str]:
    """Return their `safe_name`s; where two would be one file, the later one gets "-2", "-3", ... before `ending`.

    Args:
        fold_case: names that differ in case only count as one, as they do on Windows and macOS.
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
    """Cut to at most that many bytes, at the end of a character."""
    return name.encode()[:max_bytes].decode(errors="ignore")
