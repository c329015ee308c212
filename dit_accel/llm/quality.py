"""`compare`: quality of sparse prefill, measured against dense attention on the same text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dit_accel.llm.control import PrefillSummary, disable, enable, summary
from dit_accel.llm.report import prompt_density

LAST = 128
"""Number of last positions whose distributions are compared. Generation starts there; one position would be too noisy."""
CHUNK = 512
"""Number of positions whose logits are computed at a time, to limit memory."""


@dataclass(frozen=True)
class Outputs:
    """Predictions of a model for a text."""

    nll: float
    """Mean negative log-likelihood of all tokens except the first."""
    last: Tensor
    """Log-probabilities of the next token at the last positions, `[LAST, vocabulary]`, fp32."""

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nll).exp())


@dataclass(frozen=True)
class Comparison:
    """Comparison of sparse and dense prefill on one text."""

    tokens: int
    density: float
    """See `report.prompt_density`."""
    sparse_calls: int
    """Number of sparse attention calls; with 0 both runs were dense and the comparison means nothing."""
    perplexity_dense: float
    """Perplexity of the dense run."""
    perplexity: float
    """Perplexity of the sparse run, over all positions."""
    perplexity_percent: float
    """Relative change of the perplexity, in percent."""
    kl: float
    """Mean KL(dense || sparse) of the next token over the last positions, in nats."""
    top1: float
    """Share of the last positions with the same most likely token."""


@torch.inference_mode()
def outputs(model: Any, ids: Tensor) -> Outputs:
    """Return the predictions of a model for a text, with its current attention settings.

    Args:
        model: causal language model of transformers.
        ids: token ids `[1, L]`.
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
    # The logits of a long text may not fit into memory, so the output head is applied in chunks. Models that change the
    # output of the head (soft caps, scales) fail this check, and their logits are computed in one call.
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
    """Compare sparse with dense prefill on a text. Afterwards the model is disabled.

    Args:
        model: causal language model of transformers.
        ids: token ids `[1, L]`.
        prefill: see `enable`.
        dense: `outputs` of the dense model. Default: computed by this function.

    Raises:
        ValueError: the settings are not valid, or the text has fewer than two tokens.
    """
    if ids.shape[1] < 2:
        raise ValueError(f"ids: {ids.shape[1]} tokens; must be at least 2")
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
    """Return the comparison of a dense and a sparse run.

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
