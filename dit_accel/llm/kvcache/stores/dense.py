"""`Dense`: uncompressed keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import Partial, attention_part
from dit_accel.llm.kvcache.store import Store


@dataclass
class Dense(Store):
    """Store of uncompressed keys and values in the dtype of the model."""

    name: ClassVar[str] = "dense"

    def encode(self, part: Part) -> Mapping[str, Tensor]:
        return part.tensors

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return tensors["k"], tensors["v"]

    def attend_part(self, q: Tensor, part: Part, scale: float) -> Partial:
        return attention_part(q, part.k, part.v, scale=scale, visible=part.valid)
