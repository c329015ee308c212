"""`Sample`: text window for a search or calibration. It never overlaps with the texts of the benchmark."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_accel.llm.bench.texts import read_text, text_hash
from dit_accel.llm.search.settings import SearchSettings

CHARACTERS = 12
"""Upper bound of the mean number of characters per token."""


@dataclass(frozen=True)
class Sample:
    """Tokens of a text window."""

    text: str
    """Name of the text."""
    start: int
    """Index of the first character."""
    hash: str
    ids: Tensor
    """Token ids `[1, L]`."""
    held_out: bool
    """True if the sample is only used to check results."""

    @property
    def name(self) -> str:
        """Unique name in a search."""
        return f"{self.text}:{self.start}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"text": self.text, "start": self.start, "hash": self.hash, "held_out": self.held_out}  # fmt: skip


def make_samples(tokenizer: Any, settings: SearchSettings) -> list[Sample]:
    """Return windows spread over the second half of each text, which the benchmark does not use.

    The last windows of each text are held out.

    Args:
        tokenizer: tokenizer of transformers.
        settings: texts, sample length and numbers of samples.

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
                    f"length={settings.length}: half of the text {name!r} has {count} samples of only about {ids.shape[1]} "
                    "tokens; pass shorter or fewer samples, or a longer text"
                )
            found.append(Sample(name, start, text_hash(window), ids, i >= settings.samples))
    return found
