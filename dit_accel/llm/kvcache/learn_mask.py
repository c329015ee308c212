"""Learning which channels of the keys a model needs (LeanK, arXiv 2508.02215), on texts and without changing its weights.

Keys between the first and the last tokens get a factor for each channel, `s = q . (k * alpha)`. The factors are learned so
that the last hidden states of the text that follows stay as they are while the mean factor falls; then the largest ones are
kept, and those are trained a little with all others at 0.
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
"""Weight of the mean factor in the loss, the paper's."""
HARD_STEPS = 0.1
"""Steps with the hard mask over those before."""
EDGES = 0.2
"""Share of the steps in which the learning rate rises, and of those in which it falls."""


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How a mask is learned."""

    keep: float | int = 0.5
    """Share of the channels that are kept, over all layers and heads."""
    multiple: int | None = None
    """Channels of a head are a multiple of this. Default: an eighth of head_dim."""
    steps: int = 100
    """Steps of training; 0: a mask from the energies E[q^2] E[k^2] of each channel alone, as shares of their head."""
    rate: float | int = 0.02
    """Largest learning rate."""
    sink: int = 64
    """First tokens whose keys stay whole, as in the cache."""
    recent: int = 128
    """Last tokens whose keys stay whole."""

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
    """A text whose first part is read exactly, and the hidden states of what follows."""

    cache: DynamicCache
    """Keys and values of the first part."""
    ids: Tensor
    """Tokens that follow, `[1, n]`."""
    states: Tensor
    """Their last hidden states with exact attention."""


class _Factors:
    """Attention with factors on the channels of stored keys, as a policy of a model (see `install`)."""

    def __init__(
        self, settings: MaskSettings, full: Bool[Tensor, " layers"], alpha: Tensor | None = None
    ) -> None:
        self.settings = settings
        self.full = full
        """Layers without a sliding window; only these have factors."""
        self.alpha = alpha
        """Factors `[layers, h, d]`; None: exact attention."""
        self.mask: Tensor | None = None
        """Channels that are kept in the second stage."""
        self.queries: dict[int, Tensor] = {}
        """Mean squares of the queries of each layer `[h, d]`, from exact calls."""
        self.before: list[tuple[Any, Any]] = []
        self.tracker = self.kv = self.cache_hook = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rules: Any
    ) -> Tensor:
        """Return the attention output of the last positions."""
        rows = grouped(q, k.shape[1])
        at = torch.arange(k.shape[2], device=k.device)
        last = at[-q.shape[2] :, None]
        scores = torch.einsum("bhgld,bhnd->bhgln", rows, k)
        if self.alpha is None:
            self.queries[layer] = rows.float().square().mean((0, 2, 3))
        elif self.full[layer]:
            alpha = self.alpha[layer]
            if self.mask is not None:  # the gradient goes through as if nothing was cut
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
    """Return the channels that are kept, and the factors that they were chosen by.

    Args:
        model: causal language model of transformers; its weights are not changed.
        texts: tokens `[1, L]`.
        settings: see `MaskSettings`.
        follow: tokens at the end of each text that read the others through the mask.
        on_step: called with the number of each step and its loss.

    Returns:
        Layers with a sliding window, which caches leave alone, keep all channels.

    Raises:
        ValueError: a text is too short, no layer has full attention, or the model cannot take another attention function.
    """
    least = settings.sink + settings.recent + follow
    for ids in texts:
        if ids.shape[1] <= least:
            raise ValueError(
                f"texts: {ids.shape[1]} tokens; accepted are more than {least} (sink, recent and {follow} that follow)"
            )
    disable(model)
    full = torch.tensor([type(x) is DynamicLayer for x in DynamicCache(config=model.config).layers])
    if not full.any():
        raise ValueError("model: no layer has full attention; accepted are models with one")
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
    """Return the channels that are kept: all of those of other layers."""
    mask = torch.ones_like(alpha, dtype=torch.bool)
    mask[full] = hard_mask(alpha[full], keep, multiple)
    return mask


def hard_mask(
    alpha: Float[Tensor, "layers h d"], keep: float, multiple: int
) -> Bool[Tensor, "layers h d"]:
    """Return the channels that are kept: those above one threshold for the whole model, rounded in each head.

    Args:
        alpha: factors or energies.
        keep: share of the channels above the threshold.
        multiple: the number in a head is rounded to a multiple of this; halves are rounded up.
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
    """Return a text with its exact hidden states, and the energies E[q^2] E[k^2] of each channel.

    Energies are shares of those of their head: heads whose scores are large do not need more channels. The first and the
    last keys do not count, because they stay whole.
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
    """Return the last hidden states of new tokens."""
    found: Tensor = model.get_decoder()(ids, past_key_values=cache).last_hidden_state
    return found
