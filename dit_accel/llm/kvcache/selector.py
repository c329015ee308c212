"""`Selector`: chooses the stored tokens that a query reads."""

from abc import ABC
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import Partial
from dit_accel.llm.kvcache.store import Store
from dit_accel.llm.plugins import class_named, classes_in, with_options

PACKAGE = "dit_accel.llm.kvcache.selectors"


@dataclass(frozen=True)
class PromptQueries:
    """Queries of a prompt, and the tokens of the prompt that stay exact."""

    q: Float[Tensor, "b h g l_q d"]
    """Queries of all tokens of the prompt, grouped by KV head."""
    first: Part
    """Tokens before the stored ones."""
    last: Part
    """Tokens after the stored ones."""


@dataclass
class Selector(ABC):
    """Base class of selectors: chooses tokens in one layer. The fields of a subclass are its options.

    The methods of the base class let every query read all stored tokens.
    """

    name: ClassVar[str]
    settled: ClassVar[frozenset[str]] = frozenset()
    """Non-option fields that are not saved with a cache. `restored` recomputes them."""
    forgets: ClassVar[bool] = False
    """True if the selector drops tokens, so that a `crop` cannot restore them."""

    def append(self, store: Store, part: Part, prompt: PromptQueries | None, scale: float) -> None:
        """Process new tokens and append those to keep to the store.

        Args:
            store: store of the layer.
            part: exact tokens; their number is a multiple of `store.granule`.
            prompt: the prompt that contains the tokens; None for tokens after the prompt.
            scale: factor of the dot products.
        """
        store.append(part)

    def attend(
        self, store: Store, q: Float[Tensor, "b h g l_q d"], scale: float
    ) -> tuple[list[Partial], float]:
        """Return the attention of queries over stored tokens as mergeable parts, and the share of the tokens that was read."""
        return [store.attend(q, scale)], 1.0

    def crop(self, store: Store, count: int) -> Part | None:
        """Remove the last `count` tokens that were appended, see `Store.crop`."""
        return store.crop(count)

    def restored(self, store: Store) -> None:  # noqa: B027
        """Recompute fields that are not saved, after a cache was read from a file."""

    def rows(self, index: Int[Tensor, " n"]) -> None:  # noqa: B027 (most hold nothing)
        """Select the batch rows `index`, in this order."""

    def fork(self) -> "Selector":
        """Return a copy that shares memory until one of the two changes."""
        return copy(self)

    def clear(self) -> None:  # noqa: B027
        """Remove all tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of the data of the selector."""
        return 0


def selector_of(name: str, options: dict[str, Any] | None = None) -> Selector:
    """Return a new selector.

    Args:
        name: name of the selector.
        options: field values. Default: the defaults of the selector.

    Raises:
        ValueError: a name or an option does not exist, or a value is invalid.
    """
    kind = class_named("select", name, classes_in(PACKAGE, Selector))
    return with_options(kind, name, options, "select_options")
