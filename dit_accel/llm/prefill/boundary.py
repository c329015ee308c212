"""Boundary: separate budgets for pairs of modalities (Q-boundary and 2D-boundary of MMInference, arXiv 2504.16083)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.config.base import check, check_choice, is_int, is_number, suggest
from dit_accel.kernels import SparsePlan
from dit_accel.llm.prefill.pattern import Pattern, Prompt
from dit_accel.llm.prefill.xattention import STRIDES, antidiagonal_mass

TEXT = "text"
"""Modality of tokens outside of all spans."""
FOUND = ["image", "video"]
"""Modalities that are found automatically in the prompts of multimodal models."""


@dataclass(frozen=True)
class Boundary(Pattern):
    """Pattern with a share of the attention for each pair of query modality and key modality.

    For each key modality, a query block reads the fewest blocks that reach this share of the estimated attention to the
    modality. A block with tokens of several modalities counts as each of them. MMInference estimates attention from the
    last queries of each modality; this pattern estimates it for every query block (see `XAttention`).
    """

    name: ClassVar[str] = "boundary"
    spans: tuple[Any, ...] | list[Any] = ()
    """Token ranges of the prompt with their modality, (start, stop, name), in ascending order. Other tokens are "text". If
    empty, images and videos are found in the prompts of multimodal models; other prompts are all text."""
    share: float | int = 0.9
    """Share in [0, 1] for pairs that are not in `shares`."""
    shares: dict[str, Any] = field(default_factory=dict)
    """Shares by query modality and key modality: {"video": {"video": 0.5}}. A number instead of the inner mapping applies to
    all key modalities."""
    stride: int = 8
    """Stride of the antidiagonals in the estimate: 8 or 16."""

    def __post_init__(self) -> None:
        check("spans", self.spans, isinstance(self.spans, list | tuple), "a list of spans")
        end = 0
        for span in self.spans:
            ok = isinstance(span, list | tuple) and len(span) == 3 and isinstance(span[2], str)
            ok = ok and is_int(span[0]) and is_int(span[1]) and end <= span[0] < span[1]
            check("spans", span, ok, f"(start, stop, name) with {end} <= start < stop")
            end = span[1]
        object.__setattr__(self, "spans", tuple(tuple(x) for x in self.spans))
        _check_share("share", self.share)
        check("shares", self.shares, isinstance(self.shares, dict), "a mapping of modalities")
        for query, inner in self.shares.items():
            self._check_name(query)
            if not isinstance(inner, dict):
                _check_share("shares", inner)
                continue
            for key, value in inner.items():
                self._check_name(key)
                _check_share("shares", value)
        check_choice("stride", self.stride, STRIDES)

    @property
    def reads_spans(self) -> bool:
        return not self.spans

    @property
    def modalities(self) -> list[str]:
        """Names of all modalities, starting with "text"."""
        names = [name for _, _, name in self.spans] or FOUND
        return list(dict.fromkeys([TEXT, *names]))

    def share_of(self, query: str, key: str) -> float:
        """Return the attention share for a query modality and a key modality."""
        inner = self.shares.get(query, self.share)
        return float(inner.get(key, self.share) if isinstance(inner, dict) else inner)

    def plan(self, prompt: Prompt) -> SparsePlan:
        mass = antidiagonal_mass(
            prompt.q, prompt.k, block=prompt.block, stride=self.stride, scale=prompt.scale
        )
        rows = self.members(prompt, prompt.offset, prompt.q_len)
        columns = self.members(prompt, 0, prompt.kv_len)
        mask = torch.zeros_like(mass, dtype=torch.bool)
        for n, key in enumerate(self.modalities):
            held = columns[:, n, None, None]
            shares = mass.new_tensor([self.share_of(query, key) for query in self.modalities])
            # A query block with several modalities uses the largest of their shares.
            most = torch.where(rows, shares[:, None], 0.0).amax(1)
            mask |= held & fewest(mass * held, most[:, None, :, None])
        return self.from_blocks(prompt, mask)

    def members(
        self, prompt: Prompt, first: int, length: int
    ) -> Bool[Tensor, "b_spans n_names n_blocks"]:
        """Return the blocks that contain tokens of each modality.

        Args:
            prompt: the attention call.
            first: position of the first token.
            length: number of tokens.

        Returns:
            Mask with batch size 1 if all batch rows have the same spans.
        """
        names = self.modalities
        rows = [self.spans] if self.spans or not prompt.spans else prompt.spans
        of = torch.zeros(len(rows), length, dtype=torch.long)
        for row, spans in zip(of, rows, strict=True):
            for start, stop, name in spans:
                row[max(0, start - first) : max(0, stop - first)] = names.index(name)
        token = (
            of.to(prompt.q.device)[:, None]
            == torch.arange(len(names), device=prompt.q.device)[:, None]
        )
        token = torch.nn.functional.pad(token, (0, -length % prompt.block))
        return token.unflatten(2, (-1, prompt.block)).any(-1)

    def _check_name(self, name: Any) -> None:
        known = self.modalities
        hint = suggest(str(name), known)
        if name not in known:
            raise ValueError(
                f"shares: {name!r} is not a modality{hint}; must be one of {', '.join(known)}"
            )


def _check_share(name: str, value: Any) -> None:
    check(name, value, is_number(value) and 0 <= value <= 1, "a share in [0, 1]")


def fewest(
    mass: Float[Tensor, "b h n_q n_k"], share: Float[Tensor, "b_share 1 n_q 1"]
) -> Bool[Tensor, "b h n_q n_k"]:
    """Return the mask of the fewest blocks of each row that reach a share of its total mass. A share of 1 keeps all blocks."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < share * ordered.sum(-1, keepdim=True)) | (share == 1)
    return torch.zeros_like(kept).scatter_(-1, order, kept)
