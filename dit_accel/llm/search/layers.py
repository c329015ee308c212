"""`rank_layers` and `choose_layers`: find layers that tolerate a cheap pattern in all heads (TriangleMix, arXiv 2507.21526).

TriangleMix ranks layers by a gradient. Here the sensitivity of a layer is the KL divergence at the last positions when only
this layer uses the pattern (mean over samples). The chosen layers together are then checked on held-out samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.config import PrefillConfig
from dit_accel.config.prefill import DENSE
from dit_accel.llm.control import disable, enable
from dit_accel.llm.quality import LAST
from dit_accel.llm.search.journal import Journal
from dit_accel.llm.search.samples import Sample
from dit_accel.llm.search.settings import SearchSettings


def rank_layers(
    model: Callable[[], Any],
    samples: Sequence[Sample],
    settings: SearchSettings,
    num_layers: int,
    journal: Journal,
    on_step: Callable[[], None],
) -> list[float]:
    """Return the sensitivity of each layer. Measurements that the journal contains are not repeated.

    Args:
        model: function that returns the model; called only if a measurement is missing.
        samples: samples. Held-out samples are skipped.
        settings: pattern, block size and tail.
        num_layers: number of layers of the model.
        journal: journal with the KL by sample and layer.
        on_step: called after each layer of a sample.
    """
    used = [x for x in samples if not x.held_out]
    for sample in used:
        dense: Tensor | None = None
        for layer in range(num_layers):
            key = f"{sample.name}/{layer}"
            if key in journal:
                continue
            if dense is None:
                dense = last_log_probabilities(disable(model()), sample.ids)
            journal[key] = _divergence(model(), sample, dense, settings, [layer])
            on_step()
    return [sum(journal[f"{x.name}/{i}"] for x in used) / len(used) for i in range(num_layers)]


def measured(samples: Sequence[Sample], num_layers: int, journal: Journal) -> int:
    """Return the number of pairs of sample and layer that the journal contains."""
    return sum(
        f"{x.name}/{i}" in journal for x in samples if not x.held_out for i in range(num_layers)
    )


def choose_layers(
    model: Callable[[], Any],
    samples: Sequence[Sample],
    settings: SearchSettings,
    sensitivity: Sequence[float],
    journal: Journal,
) -> dict[str, Any]:
    """Return the result with the largest number of layers whose KL on held-out samples is at most `max_kl`.

    Args:
        model: function that returns the model; called only if a measurement is missing.
        samples: samples. Only held-out samples are used.
        settings: pattern and bounds.
        sensitivity: sensitivity of each layer, see `rank_layers`.
        journal: journal with the KL of the n least sensitive layers together, by n and sample.
    """
    order = sorted(range(len(sensitivity)), key=lambda i: (sensitivity[i], i))
    most = len(order) // 3 if settings.max_layers is None else settings.max_layers
    (name,) = settings.candidates
    held_out = [x for x in samples if x.held_out]
    dense: dict[str, Tensor] = {}
    tried: dict[str, float] = {}
    kept: list[int] = []
    for count in range(min(most, len(order)), 0, -1):
        for sample in held_out:
            key = f"{sample.name}/{count} layers"
            if key in journal:
                continue
            if sample.name not in dense:
                dense[sample.name] = last_log_probabilities(disable(model()), sample.ids)
            journal[key] = _divergence(model(), sample, dense[sample.name], settings, order[:count])
        together = [journal[f"{x.name}/{count} layers"] for x in held_out]
        tried[str(count)] = sum(together) / len(together)
        if tried[str(count)] <= settings.max_kl:
            kept = sorted(order[:count])
            break
    return {
        "chosen": [name if i in kept else DENSE for i in range(len(order))],
        "layers_found": kept,
        "sensitivity": list(sensitivity),
        "held_out_kl": tried,
    }


@torch.inference_mode()
def last_log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Return the log-probabilities of the next token at the last positions, `[LAST, vocabulary]`, fp32."""
    kept = min(LAST, ids.shape[1])
    out = model(ids.to(model.device), use_cache=False, logits_to_keep=kept)
    logits: Tensor = out.logits[0]
    return logits.float().log_softmax(-1)


def _divergence(
    model: Any, sample: Sample, dense: Tensor, settings: SearchSettings, layers: Sequence[int]
) -> float:
    """Return the mean KL(dense || sparse) with the pattern in the given layers. Afterwards the model is disabled."""
    (pattern,) = settings.candidates.values()
    config = PrefillConfig(
        pattern=DENSE,
        by_layer=dict.fromkeys(layers, pattern),
        dense_layers=0,
        block=settings.block,
        tail=settings.tail,
        crossover=0,
    )
    enable(model, prefill=config)
    try:
        sparse = last_log_probabilities(model, sample.ids)
    finally:
        disable(model)
    return float((dense.exp() * (dense - sparse)).sum(-1).mean().clamp(min=0))
