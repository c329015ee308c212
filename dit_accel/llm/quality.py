"""`compare`: how far a language model with sparse prefill is from the same model with dense attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dit_accel.llm.control import PrefillSummary, disable, enable, summary
from dit_accel.llm.report import prompt_density

LAST = 128
"""Positions at the end whose distributions are compared: what a user of prefill sees. One position alone is noise."""
CHUNK = 512
"""Positions whose logits exist at a time."""


@dataclass(frozen=True)
class Outputs:
    """Predictions of a model on a text."""

    nll: float
    """Mean negative log-likelihood of all tokens but the first."""
    last: Tensor
    """Log-probabilities of the next token at the last positions, `[LAST, vocabulary]`, fp32."""

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nll).exp())


@dataclass(frozen=True)
class Comparison:
    """Sparse against dense prefill on one text."""

    tokens: int
    density: float
    """See `report.prompt_density`."""
    sparse_calls: int
    """Attention calls that were sparse; 0: both runs were dense, and nothing was compared."""
    perplexity_dense: float
    """Perplexity of the dense run."""
    perplexity: float
    """Perplexity of the sparse run, over all positions."""
    perplexity_percent: float
    """Change of the perplexity, in percent."""
    kl: float
    """Mean KL(dense || sparse) of the next token over the last positions, in nats."""
    top1: float
    """Share of the last positions with the same most likely token."""


@torch.inference_mode()
def outputs(model: Any, ids: Tensor) -> Outputs:
    """Return what a model, as it is set, predicts on a text.

    Args:
        model: causal language model of transformers.
        ids: tokens `[1, L]`.
    """
    ids = ids.to(model.device)
    hidden: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(
        lambda module, args, out: hidden.append(out[0] if isinstance(out, tuple) else out.last_hidden_state)
    )  # fmt: skip
    try:
        final = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    finally:
        hook.remove()
    head = model.get_output_embeddings()
    states = hidden[-1][0]
    # Logits of a long text do not fit into memory, so the head is applied in parts. Models that change its output
    # (soft caps, scales) are found out here and are computed at once.
    whole = None
    if not torch.allclose(head(states[-1:])[0].float(), final.float(), rtol=1e-3, atol=1e-3):
        whole = model(ids, use_cache=False).logits[0]

    def logits(start: int, stop: int) -> Tensor:
        part = head(states[start:stop]) if whole is None else whole[start:stop]
        return part.float()

    length = ids.shape[1]
    losses = [
        cross_entropy(logits(i, stop), ids[0, i + 1 : stop + 1], reduction="sum").double()
        for i in range(0, length - 1, CHUNK)
        for stop in (min(i + CHUNK, length - 1),)
    ]
    last = logits(max(0, length - LAST), length).log_softmax(-1)
    return Outputs(float(torch.stack(losses).sum() / (length - 1)), last)


def compare(model: Any, ids: Tensor, prefill: Any, *, dense: Outputs | None = None) -> Comparison:
    """Return how far sparse prefill is from dense on a text. The model is dense afterwards.

    Args:
        model: causal language model of transformers.
        ids: tokens `[1, L]`.
        prefill: see `enable`.
        dense: `outputs` of the dense model. Default: computed here.

    Raises:
        ValueError: the settings are not valid, or the text has less than two tokens.
    """
    if ids.shape[1] < 2:
        raise ValueError(f"ids: {ids.shape[1]} tokens; accepted is a text of at least two")
    disable(model)
    if dense is None:
        dense = outputs(model, ids)
    enable(model, prefill=prefill)
    try:
        sparse, found = outputs(model, ids), summary(model)
    finally:
        disable(model)
    return comparison(dense, sparse, found, ids.shape[1])


def comparison(dense: Outputs, sparse: Outputs, found: PrefillSummary, tokens: int) -> Comparison:
    """Return the figures of two runs.

    Args:
        dense, sparse: predictions of the two runs.
        found: summary of the sparse run.
        tokens: length of the text.
    """
    kl = (dense.last.exp() * (dense.last - sparse.last)).sum(-1).mean().clamp(min=0)
    density = prompt_density(found)
    return Comparison(
        tokens=tokens,
        density=1.0 if density is None else density,
        sparse_calls=found.sparse_calls,
        perplexity_dense=dense.perplexity,
        perplexity=sparse.perplexity,
        perplexity_percent=100 * (sparse.perplexity / dense.perplexity - 1),
        kl=float(kl),
        top1=float((dense.last.argmax(-1) == sparse.last.argmax(-1)).float().mean()),
    )
