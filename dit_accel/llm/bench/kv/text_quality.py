"""`predict_rest`: predictions for the rest of a text whose first part is in a KV cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class RestPredictions:
    """Predictions for the second part of a text."""

    nll: float
    """Mean negative log-likelihood of the tokens."""
    log_probabilities: Tensor
    """Log-probabilities of the next token at each position, `[L, vocabulary]`, fp32."""
    cache_bytes: int
    """Bytes of the cache after the first part."""
    read_share: float | None
    """Mean share of the cached tokens that a call read; None if the cache does not count reads."""

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nll).exp())


@torch.inference_mode()
def predict_rest(
    model: Any, ids: Tensor, before: int, cache: Any, step: int = 256
) -> RestPredictions:
    """Return the predictions for all tokens after the first `before` tokens.

    Args:
        model: causal language model with its current settings.
        ids: token ids `[1, L]`.
        before: number of tokens that are processed first, in one call.
        cache: empty cache.
        step: number of tokens of each further call.
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
    return RestPredictions(nll, logits.log_softmax(-1), size, share)


def distance(exact: RestPredictions, other: RestPredictions) -> dict[str, float]:
    """Compare predictions with exact ones: change of the perplexity in percent, mean KL(exact || other), top-1 agreement."""
    p, q = exact.log_probabilities, other.log_probabilities
    kl = (p.exp() * (p - q)).sum(-1).mean().clamp(min=0)
    return {
        "perplexity": other.perplexity,
        "perplexity_percent": 100 * (other.perplexity / exact.perplexity - 1),
        "kl": float(kl),
        "top1": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    }
