"""`Sample`: a window of a text. Searches use other windows than the benchmark."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_accel.llm.bench.texts import fingerprint, read_text
from dit_accel.llm.search.settings import SearchSettings

CHARACTERS = 12
"""Characters of a token at most, on average."""


@dataclass(frozen=True)
class Sample:
    """Tokens of a window."""

    text: str
    """Name of the text."""
    start: int
    """First character."""
    hash: str
    ids: Tensor
    """`[1, L]`."""
    held_out: bool
    """Whether the sample is for checks only."""

    @property
    def name(self) -> str:
        """Name that is unique in a search."""
        return f"{self.text}:{self.start}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"text": self.text, "start": self.start, "hash": self.hash, "held_out": self.held_out}  # fmt: skip


def make_samples(tokenizer: Any, settings: SearchSettings) -> list[Sample]:
    """Return windows spread over the second half of each text, which the benchmark does not reach; the last ones of a text
    are held out.

    Args:
        tokenizer: tokenizer of transformers.
        settings: texts, length and number of samples.

    Raises:
        ValueError: a text cannot be read or is too short.
    """
    found = []
    count = settings.samples + settings.checks
    for name in settings.texts:
        text = read_text(name)
        first = len(text) // 2
        room = (len(text) - first) // count
        for i in range(count):
            start = first + i * room
            window = text[start : start + min(room, CHARACTERS * settings.length)]
            ids = tokenizer(window, return_tensors="pt").input_ids[:, : settings.length].long()
            if ids.shape[1] < settings.length:
                raise ValueError(
                    f"length={settings.length}: half of the text {name!r} has room for {count} samples of about "
                    f"{ids.shape[1]} tokens; accepted are shorter or fewer samples, or a longer text"
                )
            found.append(Sample(name, start, fingerprint(window), ids, i >= settings.samples))
    return found
