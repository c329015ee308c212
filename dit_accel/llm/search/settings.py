"""`SearchSettings`: candidates, texts and budget of a pattern search."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.config.base import check, check_choice, check_fraction, is_int, is_number, read_yaml
from dit_accel.config.prefill import BLOCKS, DENSE
from dit_accel.llm.prefill.by_head import ByHead

FIND = ("heads", "groups", "layers")
MIN_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of `dit-accel llm search`."""

    find: str = "heads"
    """"heads": find a pattern for each query head; "groups": for each group of query heads that share keys; "layers": find
    the layers that tolerate one pattern in all heads (TriangleMix)."""
    candidates: dict[str, Any] = field(default_factory=dict)
    """Candidate patterns by names of your choice; empty: `default_candidates`. Exactly one for "layers"."""
    density: float | int = 0.3
    """Mean share of the query-key pairs over heads and layers; not used with "layers"."""
    max_layers: int | None = None
    """Maximum number of layers with the pattern, for "layers"; None: a third of all layers."""
    max_kl: float | int = 0.01
    """Largest mean KL on the held-out samples in nats, for "layers"."""
    length: int = 4096
    """Number of tokens per sample."""
    texts: tuple[str, ...] = ("prose", "code")
    """Names of texts: prose, code, or paths of text files."""
    samples: int = 2
    """Number of samples from each text for the measurements."""
    checks: int = 1
    """Number of further samples from each text on which the result is checked."""
    block: int = 64
    """Number of tokens per block."""
    tail: int = 128
    """Smallest number of last queries that read every key."""

    def __post_init__(self) -> None:
        check_choice("find", self.find, FIND)
        check_fraction("density", self.density)
        number = self.max_layers
        ok = number is None or (is_int(number) and number >= 1)
        check("max_layers", number, ok, "an int >= 1 or None")
        ok = is_number(self.max_kl) and self.max_kl >= 0
        check("max_kl", self.max_kl, ok, "a number >= 0")
        ok = is_int(self.length) and self.length >= MIN_LENGTH
        check("length", self.length, ok, f"an int >= {MIN_LENGTH}")
        ok = len(set(self.texts)) == len(self.texts) > 0
        check("texts", self.texts, ok, "different texts, at least one")
        for name, least in (("samples", 1), ("checks", 0)):
            value = getattr(self, name)
            check(name, value, is_int(value) and value >= least, f"an int >= {least}")
        ok = self.checks > 0 or self.find != "layers"
        check("checks", self.checks, ok, "an int >= 1 for layers")
        check_choice("block", self.block, BLOCKS)
        check("tail", self.tail, is_int(self.tail) and self.tail >= 0, "an int >= 0")
        if not self.candidates:
            object.__setattr__(self, "candidates", default_candidates(self.find))
        _check_candidates(self.candidates)
        if self.find == "layers":
            ok = len(self.candidates) == 1
            check("candidates", list(self.candidates), ok, "one pattern for layers")

    @property
    def by(self) -> str:
        """Value of `ByHead.by` for the result."""
        return "group" if self.find == "groups" else "head"


def default_candidates(find: str) -> dict[str, Any]:
    """Return the default candidates. Their budgets grow with the length of the prompt.

    Args:
        find: see `SearchSettings.find`.
    """
    if find == "layers":
        return {"triangle": {"pattern": "triangle", "options": {}}}
    shared = {"per_group": True} if find == "groups" else {}
    found: dict[str, Any] = {
        f"window_{round(100 * x):02}": {"pattern": "triangle", "options": {"window": x}}
        for x in (1 / 16, 1 / 4)
    }
    for columns, several in ((1 / 32, (0.4, 0.6, 0.75, 0.85, 0.9, 0.95)), (1 / 8, (0.4, 0.75))):  # fmt: skip
        for top_p in several:
            name = f"hybrid_{round(100 * top_p):02}" + ("_columns" if columns > 0.1 else "")
            options = {"top_p": top_p, "columns": columns, **shared}
            found[name] = {"pattern": "hybrid", "options": options}
    if find == "heads":
        found["slashes"] = {
            "pattern": "vertical_slash",
            "options": {"columns": 0.04, "slashes": 0.1},
        }
    return found


def read_candidates(path: Path) -> dict[str, Any]:
    """Read candidate patterns by name from a YAML or JSON file.

    Raises:
        ValueError: the content is not a mapping from names to patterns.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"candidates={str(path)!r}: must be a mapping from names to patterns")
    _check_candidates(data)
    return data


def _check_candidates(candidates: dict[str, Any]) -> None:
    if DENSE in candidates:
        raise ValueError(f"candidates: {DENSE!r} is always a candidate; must be another name")
    for name, value in candidates.items():
        if not isinstance(value, dict):
            raise ValueError(
                f"candidates: {name!r} is {value!r}; must be a mapping with pattern and options"
            )
    ByHead(heads=[DENSE], choices=candidates)
