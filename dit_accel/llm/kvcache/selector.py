"""`Selector`: which of the stored tokens a query reads."""

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
class Prompt:
    """Queries of a prompt and those of its tokens that stay exact."""

    q: Float[Tensor, "b h g l_q d"]
    """Queries of all tokens of the prompt, by the head of keys that they read."""
    first: Part
    """Tokens before the stored ones."""
    last: Part
    """Tokens after the stored ones."""


@dataclass
class Selector(ABC):
    """Choice of tokens in one layer. The options of a selector are its fields.

    As it is, every query reads all tokens.
    """

    name: ClassVar[str]
    settled: ClassVar[frozenset[str]] = frozenset()
    """Fields that are no options and not saved with a cache: `restored` makes them again."""
    forgets: ClassVar[bool] = False
    """Whether tokens are dropped that a later `crop` cannot bring back into the window."""

    def append(self, store: Store, part: Part, prompt: Prompt | None, scale: float) -> None:
        """Take tokens in, and hand those that are kept to the store.

        Args:
            store: the store.
            part: exact tokens, a multiple of the store's granule.
            prompt: the prompt that the tokens are part of; None: the tokens come later.
            scale: factor of the dot products.
        """
        store.append(part)

    def attend(
        self, store: Store, q: Float[Tensor, "b h g l_q d"], scale: float
    ) -> tuple[list[Partial], float]:
        """Return the attention of new queries over stored tokens in parts, and the share of the tokens that was read."""
        return [store.attend(q, scale)], 1.0

    def crop(self, store: Store, count: int) -> Part | None:
        """Remove the last `count` tokens that were taken in; see `Store.crop`."""
        return store.crop(count)

    def restored(self, store: Store) -> None:  # noqa: B027
        """Make what is not saved again, after a cache was read from a file."""

    def rows(self, index: Int[Tensor, " n"]) -> None:  # noqa: B027 (most hold nothing)
        """Keep these rows of the batch, in this order."""

    def fork(self) -> "Selector":
        """Return a selector with the same state, which both share until they change."""
        return copy(self)

    def clear(self) -> None:  # noqa: B027
        """Forget all tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of what it knows of the tokens."""
        return 0


def selector_names() -> list[str]:
    """Return the names of all selectors."""
    return list(classes_in(PACKAGE, Selector))


def selector_of(name: str, options: dict[str, Any] | None = None) -> Selector:
    """Return a selector by its name, without tokens.

    Raises:
        ValueError: no such selector or option, or a value that it does not accept.
    """
    kind = class_named("select", name, classes_in(PACKAGE, Selector))
    return with_options(kind, name, options, "select_options")
