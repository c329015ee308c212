"""`Group`: the processes of context parallelism, and their collectives."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from jaxtyping import Float, Shaped
from torch import Tensor

NOTE_BYTES = 32_768
"""Size in bytes of a message of `Group.agree`."""
MOST_CHARACTERS = 160
"""Most characters of a value that are shown and compared. Longer values are shortened and get a hash."""


def share(total: int, rank: int, size: int) -> int:
    """Return the number of items of a rank. The first ranks get one more if `size` does not divide `total`."""
    return (total + size - 1 - rank) // size


@dataclass(frozen=True)
class Group:
    """Processes that compute each call of a transformer together (DeepSpeed Ulysses, arXiv 2309.14509).

    Every process has the complete inputs and gets the complete output. In between, it computes a share of the tokens,
    and in attention all tokens of a share of the heads. If every process computes a loss from the complete output, the
    gradients of weights come from the tokens of the process. Their sum over the group is the gradient of a single
    process.
    """

    process_group: Any
    rank: int
    size: int
    uneven: bool = False
    """True if the size need not divide the number of heads (`ulysses_anything` of diffusers)."""

    def __deepcopy__(self, memo: dict) -> "Group":
        return self  # a copy of a transformer is on the same processes

    def shares(self, total: int) -> list[int]:
        """Return the number of items of each rank."""
        return [share(total, rank, self.size) for rank in range(self.size)]

    def own(self, total: int) -> slice:
        """Return the indices of this process's share of `total` items."""
        start = sum(share(total, rank, self.size) for rank in range(self.rank))
        return slice(start, start + share(total, self.rank, self.size))

    def check_heads(self, name: str, heads: int) -> None:
        """Refuse a number of heads that cannot be split.

        Args:
            name: name of the layer, for the message.
            heads: number of key heads of the layer.

        Raises:
            ValueError: the number of processes does not divide it, or is larger.
        """
        if heads % self.size and not (self.uneven and heads > self.size):
            more = "" if self.uneven else f"; with ulysses_anything=True: up to {heads}"
            divisors = [n for n in range(2, heads + 1) if heads % n == 0]
            accepted = f"divisors of that: {', '.join(map(str, divisors)) or 'none'}"
            raise ValueError(
                f"ulysses_degree={self.size}: {name} has {heads} heads of keys; accepted are {accepted}{more}"
            )

    # Collectives ---------------------------------------------------------------

    def exchange(self, x: Shaped[Tensor, " n"], sent: list[int], received: list[int]) -> Tensor:
        """Send a piece of `x` to each rank and return the received pieces, concatenated. Differentiable.

        Args:
            x: pieces for all ranks, concatenated.
            sent: length of each piece that is sent.
            received: length of each piece that is received.
        """
        call = (
            funcol.all_to_all_single_autograd
            if x.requires_grad and torch.is_grad_enabled()
            else funcol.all_to_all_single
        )
        return _waited(call(x, received, sent, self.process_group))

    def gather(
        self, x: Shaped[Tensor, "r n ..."], total: int, *, ends: bool = True
    ) -> Shaped[Tensor, "r m ..."]:
        """Concatenate the shares of all ranks along the second dimension.

        Args:
            x: share of this process.
            total: length of all shares together.
            ends: True if every rank computes the same from the result, up to the loss. The gradient of a share is then
                a slice of the gradient of the result. False: it is the sum of this slice over the ranks.
        """
        result: Tensor = _Gather.apply(x, total, ends, self)
        return result

    def summed(self, weight: Tensor) -> Tensor:
        """Return a weight that every rank applies to its share. The gradient is summed over the group."""
        result: Tensor = weight
        if weight.requires_grad and torch.is_grad_enabled():
            result = _SumGradient.apply(weight, self)
        return result

    def own_heads(self, weight: Float[Tensor, "h ..."], grouped: int) -> Float[Tensor, "own ..."]:
        """Return the rows of this process's heads. The gradient of the weight is summed over the group.

        Args:
            weight: one row for each query head.
            grouped: number of query heads for each key head; they stay in one process.
        """
        groups = self.summed(weight).unflatten(0, (-1, grouped))
        return groups[self.own(len(groups))].flatten(0, 1)

    def all_heads(
        self, rows: Float[Tensor, " own"], total: int, grouped: int
    ) -> Float[Tensor, " h"]:
        """Undo `own_heads` for one number per head.

        Args:
            rows: numbers of this process's heads.
            total: number of query heads in all processes.
            grouped: as in `own_heads`.
        """
        return self.gather(rows.view(1, -1, grouped), total // grouped).flatten()

    def least(self, value: int, device: torch.device) -> int:
        """Return the minimum of a value over all ranks."""
        known = torch.tensor(value, device=self.device_of(device))
        dist.all_reduce(known, dist.ReduceOp.MIN, group=self.process_group)
        return int(known)

    def agree(
        self, description: dict[str, Any], device: torch.device, error: Exception | None
    ) -> None:
        """Compare the next call of all processes. All fail if the calls differ, or if one process failed.

        Args:
            description: values of this process's call by name, see `describe_call`.
            device: device of the calls.
            error: error of this process, which is raised after the others are told; None: no error.

        Raises:
            RuntimeError: a value differs between processes, or another process failed.
        """
        if error is not None:
            shortened = {"error": f"{type(error).__name__}: {error}"[:1024]}
        else:
            shortened = {k: _short(str(x)) for k, x in description.items()}
        text = json.dumps(shortened).encode()
        note = torch.frombuffer(bytearray(text.ljust(NOTE_BYTES)), dtype=torch.uint8)
        note = note.to(self.device_of(device))
        notes = [torch.empty_like(note) for _ in range(self.size)]
        dist.all_gather(notes, note, group=self.process_group)
        descriptions = [json.loads(bytes(x.tolist())) for x in notes]
        if error is not None:
            raise error
        for rank, other in enumerate(descriptions):
            if "error" in other:
                raise RuntimeError(
                    f"process {rank} of context parallelism failed, so that all stop: {other['error']}"
                )
        names = dict.fromkeys(name for x in descriptions for name in x)
        differing = [name for name in names if len({x.get(name) for x in descriptions}) > 1]
        if differing:
            shown = "; ".join(
                f"{name}: "
                + ", ".join(f"{x.get(name)} (process {i})" for i, x in enumerate(descriptions))
                for name in differing
            )
            raise RuntimeError(
                f"the processes of context parallelism make different calls: {shown}; accepted are the same settings, prompts, "
                "sizes and seeds in all processes"
            )

    def device_of(self, device: torch.device) -> torch.device:
        """Return the device of small messages."""
        return torch.device("cpu") if "gloo" in str(self.backend) else device

    @property
    def backend(self) -> str:
        """Name of the process group's backend, such as "gloo" or "nccl"."""
        return dist.get_backend(self.process_group)


def _short(text: str) -> str:
    """Return a text. Shorten a long text and append a hash of the whole text."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _waited(x: Tensor) -> Tensor:
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x


# torch 2.13 renames all_gather_tensor, and warns about the old name.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, ends: bool, group: Group) -> Tensor:
        ctx.own, ctx.ends, ctx.group = group.own(total), ends, group
        shares = group.shares(total)
        most = shares[0]
        x = x.movedim(1, 0)
        if x.shape[0] < most:  # all ranks send as many rows as the first one
            x = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
        every = _waited(_all_gather(x.contiguous(), 0, group.process_group))
        if total != most * group.size:
            pieces = every.unflatten(0, (group.size, most))
            every = torch.cat([piece[:n] for piece, n in zip(pieces, shares, strict=True)])
        return every.movedim(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.ends:
            group = ctx.group.process_group
            grad = _waited(funcol.all_reduce(grad.contiguous(), "sum", group))
        return grad[:, ctx.own], None, None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = funcol.all_reduce(grad.contiguous(), "sum", ctx.group.process_group)
        return _waited(total), None
