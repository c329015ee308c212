"""`measure_sample`: measures error and cost of each candidate in each head during one dense pass over a sample."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_accel.kernels import block_sparse_attention
from dit_accel.llm.control import attention_layers, disable, install
from dit_accel.llm.dense import dense_attention
from dit_accel.llm.padding import broadcast_mask
from dit_accel.llm.prefill import Pattern, Prompt
from dit_accel.llm.search.cost import head_densities


class Meter:
    """Policy that computes dense attention and measures candidate patterns in the same call.

    Args:
        candidates: patterns to measure.
        wanted: indices of the layers to measure.
        layers: attention layers of the model.
        residuals: squared norm of the hidden state of each token before each layer; filled during the pass.
        block, tail: settings of the plans.
        on_layer: called with the index and the measurement of each layer.
    """

    def __init__(
        self,
        candidates: Sequence[Pattern],
        wanted: set[int],
        layers: Sequence[nn.Module],
        residuals: dict[int, Tensor],
        *,
        block: int,
        tail: int,
        on_layer: Callable[[int, dict[str, Any]], None],
    ) -> None:
        self.candidates, self.wanted, self.layers = candidates, wanted, layers
        self.residuals, self.block, self.tail = residuals, block, tail
        self.on_layer = on_layer
        self.before: list[tuple[Any, Any]] = []
        self.tracker = self.kv = self.cache_hook = None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """Return dense attention. Arguments as in `Policy.attend`."""
        start = time.perf_counter()
        out = dense_attention(
            q,
            k,
            v,
            scale=scale,
            causal=causal,
            mask=broadcast_mask(mask),
            window=window,
            softcap=softcap,
        )
        seconds = time.perf_counter() - start
        if layer not in self.wanted:
            return out
        sliding = window is not None and window < k.shape[2]
        if not causal or sliding or softcap is not None or mask is not None:
            self.on_layer(layer, {"costs": [], "errors": [], "seconds": []})  # never sparse
            return out
        gram = output_gram(self.layers[layer], q.shape[1], v.shape[-1])
        prompt = Prompt(q, k, scale=scale, block=self.block, tail=self.tail, layer=layer)
        found: dict[str, Any] = {
            "costs": [],
            "errors": [],
            "seconds": [],
            "dense_seconds": round(seconds, 5),
        }
        for pattern in self.candidates:
            start = time.perf_counter()
            plan = pattern.plan(prompt)
            sparse = block_sparse_attention(q, k, v, plan, scale=scale)
            assert isinstance(sparse, Tensor)
            if q.is_cuda:
                torch.cuda.synchronize(q.device)
            found["seconds"].append(round(time.perf_counter() - start, 5))
            found["costs"].append(head_densities(plan, q.shape[1]).tolist())
            errors = contribution_errors(sparse, out, gram, self.residuals.get(layer))
            found["errors"].append(errors.tolist())
        self.on_layer(layer, found)
        return out


def output_gram(module: nn.Module, heads: int, value_dim: int) -> Float[Tensor, "heads d d"] | None:
    """Return W_h^T W_h for the columns W_h of the output projection of each head; None without a suitable projection.

    If the output of head h changes by x, the hidden states change by a vector of squared norm `x^T W_h^T W_h x`.
    """
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if weight.shape[-1] != heads * value_dim:
        return None
    parts = weight.detach().float().unflatten(1, (heads, value_dim)).transpose(0, 1)
    return parts.mT @ parts


def contribution_errors(
    sparse: Float[Tensor, "b h l d"],
    dense: Float[Tensor, "b h l d"],
    gram: Float[Tensor, "h d d"] | None,
    residual: Float[Tensor, "b l"] | None,
) -> Float[Tensor, " h"]:
    """Return the squared error of each head's contribution to the hidden states, relative to their squared norm (mean over
    tokens).

    Args:
        sparse, dense: outputs of the heads before the output projection.
        gram: see `output_gram`; None: use the error of the outputs before the projection.
        residual: squared norm of the hidden state of each token; None: use the squared norm of all dense outputs.
    """
    change = sparse.float() - dense.float()
    squares = change.square().sum(-1) if gram is None else ((change @ gram) * change).sum(-1)
    if residual is None:
        residual = dense.float().square().sum((1, 3))
    return (squares / residual[:, None].clamp(min=1e-20)).mean((0, 2))


@torch.inference_mode()
def measure_sample(
    model: Any,
    ids: Tensor,
    candidates: Sequence[Pattern],
    wanted: set[int],
    *,
    block: int,
    tail: int,
    on_layer: Callable[[int, dict[str, Any]], None],
) -> None:
    """Measure candidates on a sample. Every layer gets the inputs of a dense pass. Afterwards the model is disabled.

    Args:
        model: causal language model of transformers.
        ids: token ids `[1, L]`.
        candidates: patterns to measure.
        wanted: indices of the layers to measure.
        block, tail: settings of the plans.
        on_layer: called with the index of each layer and its measurement: `costs` and `errors` (per candidate, a list over
            heads) and `seconds` (per candidate). The lists are empty for layers that are never sparse.
    """
    layers = attention_layers(model)
    residuals: dict[int, Tensor] = {}
    hooks = [
        block_module.register_forward_pre_hook(_remember(residuals, i), with_kwargs=True)
        for i, block_module in enumerate(_decoder_layers(model, layers))
        if block_module is not None
    ]
    meter = Meter(candidates, wanted, layers, residuals, block=block, tail=tail, on_layer=on_layer)
    install(model, meter)
    try:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        disable(model)
        for hook in hooks:
            hook.remove()


def _decoder_layers(model: Any, layers: Sequence[nn.Module]) -> list[nn.Module | None]:
    """Return the parent module of each attention layer, whose input is the hidden states."""
    names = {id(module): name for name, module in model.named_modules()}
    found: list[nn.Module | None] = []
    for layer in layers:
        parent = names[id(layer)].rpartition(".")[0]
        found.append(model.get_submodule(parent) if parent else None)
    return found


def _remember(residuals: dict[int, Tensor], layer: int) -> Callable[..., None]:
    """Return a hook that records the squared norm of the hidden state of each token."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.ndim == 3:
            residuals[layer] = hidden.float().square().sum(-1)

    return hook
