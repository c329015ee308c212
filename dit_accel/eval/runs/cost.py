"""`counted_cost`: FLOPs of all transformer calls of a run, counted by torch."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dit_accel.runtime.components import transformers_of

_UNLISTED = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""Operators of `scaled_dot_product_attention` that torch's counter does not list."""


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention from the shapes of its tensors."""
    return sdpa_flop_count(q, k, v)


def counted_cost(pipe: Any, call: Callable[[], Any]) -> int:
    """Return the FLOPs of matrix products, convolutions and attention in the transformers while `call` runs.

    Operators that torch does not know, such as our own, count nothing. A compiled transformer runs eagerly meanwhile.

    Args:
        pipe: a diffusers pipeline.
        call: makes its samples.
    """
    attention = {getattr(torch.ops.aten, name): _attention for name in _UNLISTED}
    total, counting = 0, ExitStack()
    counter: FlopCounterMode | None = None

    def begin(*_: Any) -> None:
        nonlocal counter
        counter = counting.enter_context(FlopCounterMode(display=False, custom_mapping=attention))

    def end(*_: Any) -> None:
        nonlocal total
        counting.close()
        total += 0 if counter is None else counter.get_total_flops()

    with ExitStack() as hooks:
        for transformer in transformers_of(pipe):
            hooks.callback(transformer.register_forward_pre_hook(begin, prepend=True).remove)
            # A failed call too must leave torch's dispatch as it was.
            hooks.callback(transformer.register_forward_hook(end, always_call=True).remove)
        with torch.compiler.set_stance("force_eager"):
            call()
    return total
