"""`Pattern`: base class of sparse prefill patterns, and lookup of patterns by name."""

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
"""Token ranges of images and video frames in ascending order: (start, stop, "image" or "video"). Other tokens are text."""


@dataclass(frozen=True)
class Prompt:
    """Attention call with queries at the last positions of the keys: the input of a pattern."""

    q: Tensor
    """Queries `[B, Hq, Lq, D]`."""
    k: Tensor
    """Keys `[B, Hkv, Lk, D]`."""
    scale: float
    """Factor of the dot products."""
    block: int = 64
    """Number of tokens per query block and per key block."""
    tail: int = 128
    """Smallest number of last queries that read every key."""
    layer: int = 0
    """Index of the layer."""
    spans: Sequence[Spans] | None = None
    """Image and video spans of each batch row, in key positions; None if not known."""

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
        """Keyword arguments with the lengths and block sizes for `SparsePlan` constructors."""
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
        """Validated `Geometry` of the plans of this call."""
        return Geometry.of(self.q.device, **self.rules)

    def block_distance(self) -> Int[Tensor, "n_q n_k"]:
        """Return the distance in blocks from each key block to the last query of each query block; negative for later keys."""
        rows = torch.arange(1, self.num_q_blocks + 1, device=self.q.device) * self.block
        last = (rows.clamp(max=self.q_len) - 1 + self.offset) // self.block
        return last[:, None] - torch.arange(self.num_k_blocks, device=self.q.device)

    def always(self) -> Bool[Tensor, "n_q n_k"]:
        """Return the mask of blocks that every pattern reads: those of `near`, and all blocks of the last queries.

        The first block contains the attention sinks. The last queries determine the generated tokens.
        """
        return self.near() | self.last_rows()[:, None]

    def near(self) -> Bool[Tensor, "n_q n_k"]:
        """Return the mask of the first block, the diagonal block and the block before it."""
        distance = self.block_distance()
        # A query block that starts inside a key block overlaps with two key blocks.
        near = (distance >= 0) & (distance <= 1 + (self.offset % self.block > 0))
        near[:, 0] = True
        return near

    def last_rows(self) -> Bool[Tensor, " n_q"]:
        """Return the mask of query blocks that contain one of the last `tail` queries."""
        end = torch.arange(1, self.num_q_blocks + 1, device=self.q.device) * self.block
        if self.tail == 0:
            return torch.zeros_like(end, dtype=torch.bool)
        return end > self.q_len - self.tail


class Pattern(ABC):
    """Base class of patterns: chooses the keys that each query reads. Subclasses are frozen dataclasses of their options."""

    name: ClassVar[str]
    alone: ClassVar[bool] = True
    """True if the pattern can be used by its name, without options."""
    joins: ClassVar[bool] = True
    """True if `ByHead` can use the pattern for single heads, because its plans have no rules beyond `Prompt.rules`."""

    @property
    def reads_spans(self) -> bool:
        """True if plans depend on the spans of images and videos."""
        return False

    @abstractmethod
    def plan(self, prompt: Prompt) -> SparsePlan:
        """Return the plan for a call."""

    def check_heads(self, heads: int, kv_heads: int) -> None:  # noqa: B027 (most fit any model)
        """Check that the pattern fits the numbers of query heads and KV heads of a model.

        Raises:
            ValueError: the pattern is for another number of heads.
        """

    def from_blocks(
        self,
        prompt: Prompt,
        mask: Bool[Tensor, "b h n_q n_k"],
        columns: Tensor | None = None,
    ) -> SparsePlan:
        """Return the plan that reads the blocks `mask`, the blocks of `Prompt.always`, and the single keys `columns`."""
        return SparsePlan.from_block_mask(
            mask | prompt.always(),
            **prompt.rules,
            columns=columns,
            long_rows=prompt.last_rows().nonzero()[:, 0].int() if prompt.tail else None,
        )


def _classes() -> dict[str, type[Pattern]]:
    return classes_in("dit_accel.llm.prefill", Pattern)  # type: ignore[type-abstract]


def pattern_names(*, alone: bool = True) -> Sequence[str]:
    """Return the names of all patterns; with `alone`, only of patterns that need no options."""
    return [name for name, kind in _classes().items() if kind.alone or not alone]


def kind_of(name: str) -> type[Pattern]:
    """Return the class of a pattern by its name.

    Raises:
        ValueError: the pattern does not exist.
    """
    return class_named("pattern", name, _classes())


def pattern_of(name: str, options: dict[str, Any] | None = None) -> Pattern:
    """Return a pattern.

    Args:
        name: name of the pattern, see `pattern_names`, or "by_head".
        options: field values. Default: the defaults of the pattern.

    Raises:
        ValueError: the pattern or an option does not exist, or a value is invalid.
    """
    return with_options(kind_of(name), name, options)
