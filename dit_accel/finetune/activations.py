"""`measure_activations`: memory that one training step keeps for its backward pass, measured on the meta device."""

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
    """Bytes of the activations that autograd keeps for the backward pass of one micro-batch."""

    all: int
    """Bytes without gradient checkpointing."""
    checkpointed: int
    """Bytes with gradient checkpointing: the inputs of all blocks, and all activations of the largest block."""


class _Attention(torch.autograd.Function):
    """Stand-in for fused attention: saves queries, keys, values, output and log-sum-exp, but no attention matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("only the forward pass is measured")


class _MetaMode(TorchFunctionMode):
    """Replace attention and `Tensor.tolist`, which meta tensors do not support.

    Args:
        text_tokens: number of text tokens, returned for `tolist` of the mask of Lumina-Image 2.0.
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


class _SavedBytes:
    """Bytes that autograd saves in each call of a block and outside of blocks."""

    def __init__(self, model: nn.Module) -> None:
        parameters = (*model.parameters(), *model.buffers())
        self._known = {id(x.untyped_storage()): x.untyped_storage() for x in parameters}
        self.outside = 0
        """Bytes saved outside of blocks."""
        self.calls: list[int] = []
        """Bytes saved by each call of a block. Some families call each block once per sample."""
        self.inputs = 0
        """Bytes of the inputs of all blocks. Each storage counts once."""
        self._inside = False
        self._input_known = dict(self._known)

    def pack(self, x: Tensor) -> Tensor:
        """Count a tensor that autograd saves (pack hook of `saved_tensors_hooks`)."""
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
        known[id(storage)] = storage  # keep a reference, so that Python does not reuse the id
        return storage.nbytes()

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Start the count of a block and count its inputs (forward pre-hook)."""
        self._inside = True
        self.calls.append(0)
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                self.inputs += self._new(x, self._input_known)

    def leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Stop the count of a block (forward hook)."""
        self._inside = False


def measure_activations(
    trainable: Trainable,
    *,
    latents: tuple[int, ...],
    batch_size: int,
    device: str = "meta",
) -> Activations:
    """Run the forward pass of the student and add up the activations that autograd saves.

    Args:
        trainable: model whose transformer is prepared for training and is on `device`.
        latents: shape of the latents of one sample.
        batch_size: number of samples in the forward pass.
        device: device of the inputs. "meta" allocates no memory and computes no values.
    """
    model = trainable.transformer
    saved = _SavedBytes(model)
    noisy = torch.zeros(batch_size, *latents, device=device)
    sigmas = torch.zeros(batch_size, device=device)
    conditions = trainable.example_conditions(batch_size, device)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x)
    meta = _MetaMode(conditions["encoder_hidden_states"].shape[1])
    with _observed_blocks(model, trainable.checkpointed, saved), hooks, meta:
        velocity = trainable.velocity(model, noisy, sigmas, conditions)
        (velocity - torch.zeros_like(velocity)).square().mean()
    return Activations(
        saved.outside + sum(saved.calls),
        saved.outside + saved.inputs + max(saved.calls, default=0),
    )


@contextmanager
def _observed_blocks(
    model: nn.Module, names: tuple[str, ...], saved: _SavedBytes
) -> Iterator[None]:
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
