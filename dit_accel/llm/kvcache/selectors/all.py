"""`All`: queries read all stored tokens."""

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.llm.kvcache.selector import Selector


@dataclass
class All(Selector):
    """Selector that lets every query read all stored tokens."""

    name: ClassVar[str] = "all"
