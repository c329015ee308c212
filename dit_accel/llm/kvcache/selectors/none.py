"""`Nothing`: queries read only the first and the last tokens (StreamingLLM, arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import Partial
from dit_accel.llm.kvcache.selector import PromptQueries, Selector
from dit_accel.llm.kvcache.store import Store


@dataclass
class Nothing(Selector):
    """Selector that drops all tokens between the first and the last ones. Later questions cannot use the dropped tokens."""

    name: ClassVar[str] = "none"
    forgets: ClassVar[bool] = True

    def append(self, store: Store, part: Part, prompt: PromptQueries | None, scale: float) -> None:
        pass

    def attend(self, store: Store, q: Tensor, scale: float) -> tuple[list[Partial], float]:
        return [], 0.0

    def crop(self, store: Store, count: int) -> Part | None:
        return None
