"""Variants of a Wan transformer with dense and sparse attention, and the forward passes of its parts."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import control
from dit_accel.runtime.install import method_of

PARTS = ("transformer", "block", "attention")
"""Measured parts: the whole transformer, its first block, and the self-attention module of this block with its
projections."""


def settings(topk: float, block: int) -> dict[str, dict[str, Any]]:
    """Return settings of sparse attention by kind, sparse in every layer. The kind "dense" has none.

    Args:
        topk: fraction of the key blocks that is read.
        block: tokens per block.
    """
    shared = {"topk": topk, "block_q": block, "block_k": block, "order": "auto"}
    shared |= {"crossover": "never", "dense_steps": 0, "dense_layers": 0}
    combines = ("none", "shared_softmax", "alpha", "proj")
    found: dict[str, dict[str, Any]] = {"dense": {}}
    found |= {name: {**shared, "combine": name} for name in combines}
    found["learned"] = {**shared, "combine": "shared_softmax", "router": "learned"}
    return found


def variant(transformer: nn.Module, sla: dict[str, Any]) -> nn.Module:
    """Return a copy of a transformer that shares its weights, with sparse attention unless `sla` is empty."""
    shared = copy.deepcopy(transformer, {id(x): x for x in transformer.parameters()})
    if sla:
        control.enable(shared, sla=sla)
    return shared


@dataclass
class Pass:
    """Forward pass of a module with fixed arguments.

    Args:
        transformer: transformer that contains the module.
        module: module to run.
        args, kwargs: arguments of the module.
        autocast: compute in bf16, with fp32 weights.
    """

    transformer: nn.Module
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: bool
    steps: int = 0

    def __call__(self) -> Tensor:
        """Run the module and return its output."""
        sparse = method_of(self.transformer, "sla")
        if sparse is not None:
            # As in fine-tuning, a learned router learns from some of the query blocks in each step.
            sparse.set_learning_step(self.steps)
        self.steps += 1
        with _precision(self.transformer, self.autocast):
            output = self.module(*self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def step(self) -> Callable[[], None]:
        """Return a function that runs forward and backward passes, and then drops all gradients.

        The gradient of the output is random, and the same in every call.
        """
        with torch.no_grad():
            gradient = torch.randn_like(self())

        def run() -> None:
            self().backward(gradient)
            for x in self.tensors():
                x.grad = None

        return run

    def tensors(self) -> list[Tensor]:
        """Return the tensors that exist before the step: weights, buffers and arguments."""
        arguments = [*self.args, *self.kwargs.values()]
        nested = [x for y in arguments for x in (y if isinstance(y, tuple) else (y,))]
        given = [x for x in nested if isinstance(x, Tensor)]
        return [*self.transformer.parameters(), *self.transformer.buffers(), *given]


def passes(transformer: Any, inputs: dict[str, Any], *, autocast: bool) -> dict[str, Pass]:
    """Return the forward pass of each part, with its arguments in a call of the transformer.

    The call also initialises the weights of `combine="alpha"` and the numbers of tokens of the sparse layers.

    Args:
        transformer: Wan transformer, with or without acceleration.
        inputs: arguments of the transformer.
        autocast: compute in bf16, with fp32 weights.
    """
    block = transformer.blocks[0]
    modules = dict(zip(PARTS, (transformer, block, block.attn1), strict=True))
    found: dict[str, Pass] = {}
    with contextlib.ExitStack() as stack, torch.no_grad(), _precision(transformer, autocast):
        for name, module in modules.items():
            stack.enter_context(_recording(module, name, transformer, found, autocast))
        transformer(**inputs)
    for name in PARTS[1:]:
        # Inside the transformer the inputs depend on trainable weights, so they need a gradient.
        for x in found[name].args:
            if isinstance(x, Tensor):
                x.requires_grad_(True)
    return found


@contextlib.contextmanager
def _recording(
    module: nn.Module, name: str, transformer: nn.Module, found: dict[str, Pass], autocast: bool
) -> Iterator[None]:
    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        leaves = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        found[name] = Pass(transformer, module, leaves, kwargs, autocast)

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _precision(transformer: nn.Module, autocast: bool) -> Any:
    device = next(transformer.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=autocast)
