"""`Pattern`: the contract of a sparse prefill pattern, and how one is found by its name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dit_accel.kernels import Geometry, SparsePlan
from dit_accel.llm.plugins import class_named, classes_in, with_options

Spans = tuple[tuple[int, int, str], ...]
"""Token ranges of images and video frames, ascending: (start, stop, "image" or "video"). Other tokens are text."""


@dataclass(frozen=True)
class Prompt:
    """A call as patterns see it: queries at the last positions, keys from the first one on."""

    q: Tensor
    """`[B, Hq, Lq, D]`."""
    k: Tensor
    """`[B, Hkv, Lk, D]`."""
    scale: float
    """Factor of the dot products."""
    block: int = 64
    """Tokens per query block and per key block."""
    tail: int = 128
    """Last queries that read every key, at least."""
    layer: int = 0
    """Index of the layer."""
    spans: Sequence[Spans] | None = None
    """Spans of each row, by the positions of the keys; None: not known."""

    @property
    def q_len(self) -> int:
        return self.q.shape[2]

    @property
    def kv_len(self) -> int:
        return self.k.shape[2]

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block)

    @property
    def num_k_blocks(self) -> int:
        return -(-self.kv_len // self.block)

    @property
    def rules(self) -> dict[str, Any]:
        """Lengths and blocks of the plans of this call, as arguments."""
        return {
            "block_q": self.block,
            "block_k": self.block,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "causal": True,
            "q_offset": self.offset,
        }

    @property
    def geometry(self) -> Geometry:
        """Lengths and blocks of the plans of this call, checked."""
        return Geometry.of(self.q.device, **self.rules)

    def block_distance(self) -> Int[Tensor, "n_q n_k"]:
        """Key blocks between the last query of each query block and a key block; negative: all keys are later."""
        rows = torch.arange(1, self.num_q_blocks + 1, device=self.q.device) * self.block
        last = (rows.clamp(max=self.q_len) - 1 + self.offset) // self.block
        return last[:, None] - torch.arange(self.num_k_blocks, device=self.q.device)

    def always(self) -> Bool[Tensor, "n_q n_k"]:
        """Blocks that every pattern reads: the first one, the diagonal, the one before, and all in the last rows.

        Attention sinks lie in the first block; the last rows decide what is generated.
        """
        return self.near() | self.last_rows()[:, None]

    def near(self) -> Bool[Tensor, "n_q n_k"]:
        """The first block, the diagonal and the block before it."""
        distance = self.block_distance()
        # A query block that begins inside of a key block reaches over three of them.
        near = (distance >= 0) & (distance <= 1 + (self.offset % self.block > 0))
        near[:, 0] = True
        return near

    def last_rows(self) -> Bool[Tensor, " n_q"]:
        """Query blocks that hold one of the last `tail` queries."""
        end = torch.arange(1, self.num_q_blocks + 1, device=self.q.device) * self.block
        if self.tail == 0:
            return torch.zeros_like(end, dtype=torch.bool)
        return end > self.q_len - self.tail


class Pattern(ABC):
    """Chooses the keys that each query of a call reads. Subclasses are frozen dataclasses of their options."""

    name: ClassVar[str]
    alone: ClassVar[bool] = True
    """Whether its name without options is a setting."""
    joins: ClassVar[bool] = True
    """Whether single heads of a layer can have it, beside other patterns: its plans have no rules but those of the call."""

    @property
    def reads_spans(self) -> bool:
        """Whether plans depend on the spans of images and videos."""
        return False

    @abstractmethod
    def plan(self, prompt: Prompt) -> SparsePlan:
        """Return the plan of a call."""

    def check_heads(self, heads: int, kv_heads: int) -> None:  # noqa: B027 (most fit any model)
        """Check that the pattern fits a model with so many query heads and KV heads.

        Raises:
            ValueError: it does not.
        """

    def from_blocks(
        self,
        prompt: Prompt,
        mask: Bool[Tensor, "b h n_q n_k"],
        columns: Tensor | None = None,
    ) -> SparsePlan:
        """Return the plan that reads these blocks, those that are always read, and single columns."""
        return SparsePlan.from_block_mask(
            mask | prompt.always(),
            **prompt.rules,
            columns=columns,
            long_rows=prompt.last_rows().nonzero()[:, 0].int() if prompt.tail else None,
        )


def _classes() -> dict[str, type[Pattern]]:
    return classes_in("dit_accel.llm.prefill", Pattern)  # type: ignore[type-abstract]


def pattern_names(*, alone: bool = True) -> Sequence[str]:
    """Return the names of all patterns; with `alone`, of those that need no options."""
    return [name for name, kind in _classes().items() if kind.alone or not alone]


def kind_of(name: str) -> type[Pattern]:
    """Return the class of a pattern by its name.

    Raises:
        ValueError: no such pattern.
    """
    return class_named("pattern", name, _classes())


def pattern_of(name: str, options: dict[str, Any] | None = None) -> Pattern:
    """Return a pattern by its name.

    Args:
        name: see `pattern_names`; also "by_head".
        options: fields of the pattern. Default: as they are.

    Raises:
        ValueError: no such pattern or option, or a value that it does not accept.
    """
    return with_options(kind_of(name), name, options)
