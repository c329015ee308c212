"""Boundary: budgets for each pair of modalities (Q-boundary and 2D-boundary of MMInference, arXiv 2504.16083)."""

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
"""Modality of tokens outside of the spans."""
FOUND = ["image", "video"]
"""Modalities that are found in prompts."""


@dataclass(frozen=True)
class Boundary(Pattern):
    """Each query block reads, of the keys of each modality, the fewest blocks whose estimated attention reaches a share
    of what the modality gets. The share depends on the modalities of the query and of the keys.

    A block with tokens of several modalities counts as each of them. MMInference estimates from the last queries of
    each modality; here every query block has an estimate of its own (see `XAttention`).
    """

    name: ClassVar[str] = "boundary"
    spans: tuple[Any, ...] | list[Any] = ()
    """Token ranges of the prompt and their modalities: (start, stop, name), ascending. Other tokens are "text". Empty:
    images and videos are found in the prompts of a multimodal model; there are none if it is not known."""
    share: float | int = 0.9
    """Share in [0, 1] of pairs without one of their own."""
    shares: dict[str, Any] = field(default_factory=dict)
    """Shares by the modality of the query, then by that of the keys: {"video": {"video": 0.5}}. A number in place of
    the inner mapping holds for the keys of all modalities."""
    stride: int = 8
    """Stride of the antidiagonals: 8 or 16."""

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
        """Names of all modalities."""
        names = [name for _, _, name in self.spans] or FOUND
        return list(dict.fromkeys([TEXT, *names]))

    def share_of(self, query: str, key: str) -> float:
        """Return the share that queries of one modality read of the attention to another."""
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
            # More is never less: a row of several modalities reads what any of them would.
            most = torch.where(rows, shares[:, None], 0.0).amax(1)
            mask |= held & fewest(mass * held, most[:, None, :, None])
        return self.from_blocks(prompt, mask)

    def members(
        self, prompt: Prompt, first: int, length: int
    ) -> Bool[Tensor, "b_spans n_names n_blocks"]:
        """Return the blocks of so many tokens from position `first` on that hold each modality.

        The rows of the batch are one where they have the same spans.
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
            raise ValueError(f"shares: {name!r} is no modality{hint}; accepted: {', '.join(known)}")


def _check_share(name: str, value: Any) -> None:
    check(name, value, is_number(value) and 0 <= value <= 1, "a share in [0, 1]")


def fewest(
    mass: Float[Tensor, "b h n_q n_k"], share: Float[Tensor, "b_share 1 n_q 1"]
) -> Bool[Tensor, "b h n_q n_k"]:
    """Return the fewest blocks of each row that hold a share of its mass; a share of 1 keeps all."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < share * ordered.sum(-1, keepdim=True)) | (share == 1)
    return torch.zeros_like(kept).scatter_(-1, order, kept)
