"""XAttention: key blocks selected by sums over their antidiagonals (arXiv 2503.16428)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.config.base import check_choice, check_fraction
from dit_accel.kernels import SparsePlan
from dit_accel.kernels.precision import no_autocast, wide
from dit_accel.llm.prefill.pattern import Pattern, Prompt

STRIDES = (8, 16)
CHUNK_SCORES = 2**22
"""Largest number of scores in memory, over all batch rows and heads: 16 MiB in fp32."""


@dataclass(frozen=True)
class XAttention(Pattern):
    """Pattern in which each query block reads the fewest key blocks whose estimated attention reaches `top_p`."""

    name: ClassVar[str] = "xattention"
    top_p: float | int = 0.9
    """Estimated softmax mass in (0, 1]; 1 reads every key."""
    stride: int = 8
    """Distance between the antidiagonals of a block: 8 or 16. The estimate costs about 1 / stride of dense scores."""

    def __post_init__(self) -> None:
        check_fraction("top_p", self.top_p)
        check_choice("stride", self.stride, STRIDES)

    def plan(self, prompt: Prompt) -> SparsePlan:
        mass = antidiagonal_mass(
            prompt.q, prompt.k, block=prompt.block, stride=self.stride, scale=prompt.scale
        )
        return self.from_blocks(prompt, blocks_of_mass(prompt, mass.log(), self.top_p))


def blocks_of_mass(
    prompt: Prompt, scores: Float[Tensor, "b h n_q n_k"], top_p: float | int
) -> Tensor:
    """Return the mask `[B, H, T_q, T_k]` of the fewest blocks per row whose softmax weights reach `top_p`."""
    everything = top_p == 1  # otherwise blocks whose weight rounds to 0 would be left out
    plan = SparsePlan.from_scores(
        scores,
        topk=1.0 if everything else None,
        top_p=None if everything else float(top_p),
        geometry=prompt.geometry,
    )
    return plan.to_block_mask()


@torch.no_grad()
def antidiagonal_mass(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    *,
    block: int,
    stride: int,
    scale: float,
) -> Float[Tensor, "b h_q n_q n_k"]:
    """Return the estimated causal attention of query blocks over key blocks. Each row sums to 1.

    The estimate combines `stride` adjacent queries, and `stride` adjacent keys, into groups. The score of a query group and a
    key group is the mean of `scale * q_i . k_j` over one antidiagonal, i + j = stride - 1. A softmax over all key groups
    that start no later than the query group is summed over key blocks and averaged over the query groups of a block.

    Args:
        q: queries at the last positions, `[B, Hq, Lq, D]`.
        k: keys `[B, Hkv, Lk, D]`.
        block: number of tokens per query block and per key block, a multiple of `stride`.
        stride: number of tokens per group.
        scale: factor of the dot products.
    """
    offset, size = k.shape[2] - q.shape[2], block // stride
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    # The last query group and the last key group may be short; missing tokens add nothing to a score.
    queries = _groups(q * (scale / stride), stride, block, reverse=True)
    keys = _groups(k, stride, block, reverse=False)
    n_q, n_k = queries.shape[2] // size, keys.shape[2] // size
    out = q.new_zeros(*q.shape[:2], n_q, n_k, dtype=wide(q))
    step = max(1, CHUNK_SCORES // (q.shape[0] * q.shape[1] * size * keys.shape[2]))
    for start in range(0, n_q, step):
        stop = min(start + step, n_q)
        end = min(n_k, (stop * block - 1 + offset) // block + 1)  # number of visible key blocks
        rows = queries[:, :, start * size : stop * size]
        with no_autocast(q):
            joined = rows.unflatten(1, (heads, group)).flatten(2, 3)
            scores = joined @ keys[:, :, : end * size].mT
        scores = scores.unflatten(2, (group, -1)).flatten(1, 2).to(wide(q))
        first = torch.arange(start * size, stop * size, device=q.device) * stride
        begins = torch.arange(end * size, device=q.device) * stride
        hidden = begins > first[:, None] + offset
        mass = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)
        mass = mass.unflatten(-1, (end, size)).sum(-1)
        real = (first < q.shape[2]).to(mass)  # ignore groups that contain only padding
        mass = (mass * real[:, None]).unflatten(2, (-1, size)).sum(3)
        out[:, :, start:stop, :end] = mass / real.unflatten(0, (-1, size)).sum(1)[:, None]
    return out


def _groups(x: Tensor, stride: int, block: int, *, reverse: bool) -> Tensor:
    """Return tokens concatenated in groups, `[B, H, L / stride, stride * D]`, padded with zeros to whole blocks."""
    x = pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, stride))
    return (x.flip(3) if reverse else x).flatten(3)
