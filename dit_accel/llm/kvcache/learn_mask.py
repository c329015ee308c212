"""`learn_mask`: learns which key channels a model needs (LeanK, arXiv 2508.02215), without changing its weights.

Each channel of the keys between the first and the last tokens gets a factor, `s = q . (k * alpha)`. Training keeps the last
hidden states of the following text close to exact ones while a penalty lowers the mean factor. The channels with the
largest factors are kept and trained for a few more steps with all other factors at 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dit_accel.config.base import check, check_fraction, is_int, is_number
from dit_accel.llm.control import disable, install
from dit_accel.llm.kvcache.cache import copied, model_sizes
from dit_accel.llm.kvcache.partial import from_scores, grouped

PENALTY = 0.06
"""Weight of the mean factor in the loss, as in the paper."""
HARD_STEPS = 0.1
"""Number of steps with the hard mask, divided by the number of steps before."""
EDGES = 0.2
"""Share of the steps for warm-up of the learning rate, and the same share for its decay."""


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Settings for learning a channel mask."""

    keep: float | int = 0.5
    """Share of the channels to keep, over all layers and heads."""
    multiple: int | None = None
    """The number of channels kept in a head is a multiple of this. Default: head_dim / 8."""
    steps: int = 100
    """Number of training steps; 0: no training, the mask is chosen by the energy E[q^2] E[k^2] of each channel."""
    rate: float | int = 0.02
    """Largest learning rate."""
    sink: int = 64
    """Number of first tokens whose keys keep all channels, as in the cache."""
    recent: int = 128
    """Number of last tokens whose keys keep all channels."""

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        for name, least in (("steps", 0), ("sink", 0), ("recent", 1)):
            value = getattr(self, name)
            check(name, value, is_int(value) and value >= least, f"an int >= {least}")
        check("rate", self.rate, is_number(self.rate) and self.rate > 0, "a number > 0")
        ok = self.multiple is None or (is_int(self.multiple) and self.multiple >= 1)
        check("multiple", self.multiple, ok, "an int >= 1 or None")


@dataclass
class Context:
    """Training text: the cache of its first part, and the tokens and exact hidden states of its last part."""

    cache: DynamicCache
    """Keys and values of the first part."""
    ids: Tensor
    """Token ids of the last part, `[1, n]`."""
    states: Tensor
    """Last hidden states of the last part with exact attention."""


class _Factors:
    """Attention policy (see `install`) that multiplies the channels of keys between the exact zones by factors."""

    def __init__(
        self, settings: MaskSettings, full: Bool[Tensor, " layers"], alpha: Tensor | None = None
    ) -> None:
        self.settings = settings
        self.full = full
        """True for layers without a sliding window. Only these have factors."""
        self.alpha = alpha
        """Factors `[layers, h, d]`; None for exact attention."""
        self.mask: Tensor | None = None
        """Mask of the kept channels in the second stage; None in the first stage."""
        self.queries: dict[int, Tensor] = {}
        """Mean squared queries `[h, d]` of each layer, recorded in exact calls."""
        self.before: list[tuple[Any, Any]] = []
        self.tracker = self.kv = self.cache_hook = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rules: Any
    ) -> Tensor:
        """Return the attention output of the queries at the last positions."""
        rows = grouped(q, k.shape[1])
        at = torch.arange(k.shape[2], device=k.device)
        last = at[-q.shape[2] :, None]
        scores = torch.einsum("bhgld,bhnd->bhgln", rows, k)
        if self.alpha is None:
            self.queries[layer] = rows.float().square().mean((0, 2, 3))
        elif self.full[layer]:
            alpha = self.alpha[layer]
            if self.mask is not None:  # straight-through gradient
                alpha = alpha + (torch.where(self.mask[layer], alpha, 0.0) - alpha).detach()
            stored = (at >= self.settings.sink) & (at <= last - self.settings.recent)
            factored = (rows * alpha[None, :, None, None]).to(k.dtype)
            cut = torch.einsum("bhgld,bhnd->bhgln", factored, k)
            scores = torch.where(stored, cut, scores)
        hidden = at > last
        if rules["window"] is not None:
            hidden = hidden | (at <= last - rules["window"])
        scores = (scores.float() * rules["scale"]).masked_fill(hidden, -torch.inf)
        return from_scores(scores, v).o.flatten(1, 2)


def learn_mask(
    model: Any,
    texts: Sequence[Tensor],
    settings: MaskSettings,
    *,
    follow: int = 128,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Bool[Tensor, "layers h d"], Float[Tensor, "layers h d"]]:
    """Return the mask of kept key channels, and the factors (or energies) by which they were chosen.

    Args:
        model: causal language model of transformers; its weights are not changed.
        texts: token ids `[1, L]` of each text.
        settings: settings of the training.
        follow: number of tokens at the end of each text whose hidden states are compared.
        on_step: called after each step with its number and loss.

    Returns:
        Mask and factors. Layers with a sliding window keep all channels, because caches do not compress them.

    Raises:
        ValueError: a text is too short, no layer has full attention, or the model does not support other attention
            functions.
    """
    least = settings.sink + settings.recent + follow
    for ids in texts:
        if ids.shape[1] <= least:
            raise ValueError(
                f"texts: {ids.shape[1]} tokens; must be more than {least} (sink + recent + {follow} at the end)"
            )
    disable(model)
    full = torch.tensor([type(x) is DynamicLayer for x in DynamicCache(config=model.config).layers])
    if not full.any():
        raise ValueError("model: must have at least one layer with full attention")
    contexts, energy = [], []
    for ids in texts:
        context, found = _context(model, ids, follow, settings, full)
        contexts.append(context)
        energy.append(found)
    sizes = model_sizes(model.config)
    multiple = settings.multiple or max(1, sizes.head_dim // 8)
    check(
        "multiple",
        multiple,
        sizes.head_dim % multiple == 0,
        f"a divisor of head_dim={sizes.head_dim}",
    )
    seed = torch.stack(energy).mean(0)
    if settings.steps == 0:
        return _in_full_layers(seed, full, settings.keep, multiple), seed
    alpha = torch.ones_like(seed).requires_grad_()
    policy = _Factors(settings, full, alpha)
    frozen = [x for x in model.parameters() if x.requires_grad]
    for x in frozen:
        x.requires_grad_(False)
    try:
        install(model, policy)
        hard = max(1, round(settings.steps * HARD_STEPS))
        _train(model, policy, contexts, settings.steps, settings.rate, PENALTY, on_step)
        policy.mask = _in_full_layers(alpha.detach(), full, settings.keep, multiple)
        _train(model, policy, contexts, hard, settings.rate / 2, 0.0, on_step, settings.steps)
    finally:
        disable(model)
        for x in frozen:
            x.requires_grad_(True)
    return _in_full_layers(alpha.detach(), full, settings.keep, multiple), alpha.detach()


def _in_full_layers(
    alpha: Float[Tensor, "layers h d"], full: Bool[Tensor, " layers"], keep: float, multiple: int
) -> Bool[Tensor, "layers h d"]:
    """Return the hard mask of layers with full attention; all channels are kept in other layers."""
    mask = torch.ones_like(alpha, dtype=torch.bool)
    mask[full] = hard_mask(alpha[full], keep, multiple)
    return mask


def hard_mask(
    alpha: Float[Tensor, "layers h d"], keep: float, multiple: int
) -> Bool[Tensor, "layers h d"]:
    """Return the mask of the channels above a threshold for the whole model, with rounded numbers per head.

    Args:
        alpha: factors or energies of the channels.
        keep: share of the channels above the threshold.
        multiple: the number of channels in a head is rounded to a multiple of this, halves up.
    """
    wanted = max(1, round(keep * alpha.numel()))
    threshold = alpha.flatten().sort(descending=True).values[wanted - 1]
    counts = ((alpha >= threshold).sum(-1) / multiple + 0.5).floor().long() * multiple
    rank = alpha.argsort(stable=True, dim=-1, descending=True).argsort(-1)
    return rank < counts[..., None]


def _train(
    model: Any,
    policy: _Factors,
    contexts: Sequence[Context],
    steps: int,
    rate: float,
    penalty: float,
    on_step: Callable[[int, float], None] | None,
    first: int = 0,
) -> None:
    alpha = policy.alpha
    assert alpha is not None
    optimizer = torch.optim.AdamW([alpha], lr=rate, weight_decay=0.0)
    for step in range(steps):
        edge = max(1.0, EDGES * steps)
        rising, falling = (step + 1) / edge, (steps - step) / edge
        optimizer.param_groups[0]["lr"] = rate * max(0.1, min(1.0, rising, falling))
        context = contexts[step % len(contexts)]
        states = _states(model, context.ids, copied(context.cache))
        loss = (states - context.states).float().square().mean()
        loss = (
            loss / context.states.float().square().mean()
            + penalty * alpha[policy.full].abs().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            alpha.clamp_(0.0, 1.0)
        if on_step is not None:
            on_step(first + step, float(loss.detach()))


@torch.no_grad()
def _context(
    model: Any, ids: Tensor, follow: int, settings: MaskSettings, full: Bool[Tensor, " layers"]
) -> tuple[Context, Tensor]:
    """Return the training context of a text, and the energy E[q^2] E[k^2] of each channel.

    Energies are divided by the total of their head, because heads with large scores do not need more channels. The first
    and the last keys are left out, because they keep all channels.
    """
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config)
    model.get_decoder()(ids[:, :-follow], past_key_values=cache)
    policy = _Factors(settings, full)
    install(model, policy)
    try:
        rest = ids[:, -follow:]
        states = _states(model, rest, copied(cache))
    finally:
        disable(model)
    layers: list[Any] = list(cache.layers)
    stored = slice(settings.sink, -settings.recent)
    energy = torch.stack(
        [
            policy.queries[i] * x.keys[:, :, stored].float().square().mean((0, 2))
            if full[i]
            else torch.ones_like(policy.queries[i])
            for i, x in enumerate(layers)
        ]
    )
    return Context(cache, rest, states), energy / energy.sum(-1, keepdim=True)


def _states(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Return the last hidden states of the tokens `ids`."""
    found: Tensor = model.get_decoder()(ids, past_key_values=cache).last_hidden_state
    return found
