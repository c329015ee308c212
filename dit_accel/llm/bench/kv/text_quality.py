"""`read_on`: how well a model reads on when what came before lies in a cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class ReadOn:
    """Predictions of the second part of a text."""

    nll: float
    """Mean negative log-likelihood of its tokens."""
    log_probabilities: Tensor
    """Log-probabilities of each next token, `[L, vocabulary]`, fp32."""
    cache_bytes: int
    """Bytes of the cache after the first part."""
    read_share: float | None
    """Share of the tokens that the calls read."""

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nll).exp())


@torch.inference_mode()
def read_on(model: Any, ids: Tensor, before: int, cache: Any, step: int = 256) -> ReadOn:
    """Return the predictions of the tokens after the first `before`.

    Args:
        model: causal language model, as it is set.
        ids: tokens `[1, L]`.
        before: tokens that are read first, in one call.
        cache: an empty cache.
        step: tokens of each further call.
    """
    from dit_accel.llm.kvcache.cache import KVCache, nbytes_of

    ids = ids.to(model.device)
    found = [model(ids[:, :before], past_key_values=cache, logits_to_keep=1).logits[0]]
    size = nbytes_of(cache)
    for part in ids[:, before:].split(step, 1):
        found.append(model(part, past_key_values=cache).logits[0])
    logits = torch.cat(found)[:-1].float()
    nll = float(cross_entropy(logits, ids[0, before:]))
    share = cache.read_share if isinstance(cache, KVCache) else None
    return ReadOn(nll, logits.log_softmax(-1), size, share)


def distance(exact: ReadOn, other: ReadOn) -> dict[str, float]:
    """Return how far a run is from an exact one: perplexity in percent, mean KL(exact || other), same first choices."""
    p, q = exact.log_probabilities, other.log_probabilities
    kl = (p.exp() * (p - q)).sum(-1).mean().clamp(min=0)
    return {
        "perplexity": other.perplexity,
        "perplexity_percent": 100 * (other.perplexity / exact.perplexity - 1),
        "kl": float(kl),
        "top1": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    }
