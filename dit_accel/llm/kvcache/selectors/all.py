"""`All`: every token."""

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.llm.kvcache.selector import Selector


@dataclass
class All(Selector):
    """Every query reads every token."""

    name: ClassVar[str] = "all"
