"""`measure_activations`: bytes that one training step keeps for its backward pass, found without computing anything."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_accel.finetune.families.base import Trainable


@dataclass(frozen=True)
class Activations:
    """Bytes that are kept for the backward pass of one micro-batch."""

    all: int
    """Without gradient checkpointing."""
    checkpointed: int
    """With gradient checkpointing: inputs of blocks, and everything of the largest call of a block."""


class _Attention(torch.autograd.Function):
    """Attention as fused kernels do it: it keeps queries, keys, values, output and log-sum-exp, no matrix of weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("sizes are measured in the forward pass alone")


class _Shapes(TorchFunctionMode):
    """Replaces what a tensor without values cannot do.

    Args:
        text_tokens: length of the texts, which Lumina-Image 2.0 reads from its mask.
    """

    def __init__(self, text_tokens: int) -> None:
        super().__init__()
        self.text_tokens = text_tokens

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
            return _Attention.apply(given["query"], given["key"], given["value"])
        if func is Tensor.tolist and args[0].is_meta:
            return [self.text_tokens] * args[0].shape[0]
        return func(*args, **kwargs)


class _Saved:
    """Storages that autograd saves, by the call of a block that saves them."""

    def __init__(self, model: nn.Module) -> None:
        parameters = (*model.parameters(), *model.buffers())
        self._known = {id(x.untyped_storage()): x.untyped_storage() for x in parameters}
        self.outside = 0
        """Bytes that are saved outside of blocks."""
        self.calls: list[int] = []
        """Bytes that each call of a block saves. A family may call its blocks once for each sample."""
        self.inputs = 0
        """Bytes of the inputs of blocks, each storage once."""
        self._inside = False
        self._input_known = dict(self._known)

    def pack(self, x: Tensor) -> Tensor:
        new = self._new(x, self._known)
        if self._inside:
            self.calls[-1] += new
        else:
            self.outside += new
        return x

    def _new(self, x: Tensor, known: dict[int, Any]) -> int:
        storage = x.untyped_storage()
        if id(storage) in known:
            return 0
        known[id(storage)] = storage  # held, so that no other storage gets its id
        return storage.nbytes()

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inside = True
        self.calls.append(0)
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                self.inputs += self._new(x, self._input_known)

    def leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._inside = False


def measure_activations(
    trainable: Trainable,
    *,
    latents: tuple[int, ...],
    batch_size: int,
    device: str = "meta",
) -> Activations:
    """Run the student's forward pass and add up what it keeps.

    Args:
        trainable: its transformer, prepared for training, is on `device`.
        latents: shape of the latents of one sample.
        batch_size: samples of a forward pass.
        device: "meta" computes nothing and needs no memory.
    """
    model = trainable.transformer
    saved = _Saved(model)
    noisy = torch.zeros(batch_size, *latents, device=device)
    sigmas = torch.zeros(batch_size, device=device)
    conditions = trainable.example_conditions(batch_size, device)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x)
    shapes = _Shapes(conditions["encoder_hidden_states"].shape[1])
    with _blocks(model, trainable.checkpointed, saved), hooks, shapes:
        velocity = trainable.velocity(model, noisy, sigmas, conditions)
        (velocity - torch.zeros_like(velocity)).square().mean()
    return Activations(
        saved.outside + sum(saved.calls),
        saved.outside + saved.inputs + max(saved.calls, default=0),
    )


@contextmanager
def _blocks(model: nn.Module, names: tuple[str, ...], saved: _Saved) -> Iterator[None]:
    blocks = [block for name in names for block in model.get_submodule(name).children()]
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(saved.enter, with_kwargs=True))
        handles.append(block.register_forward_hook(saved.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
