"""Density and reasons of dense calls from a `PrefillSummary`, and one-line texts for the command line."""

from collections import Counter
from typing import Any

from dit_accel.llm.control import PrefillSummary

DECODE = "decode"
"""Reason for dense calls with one query, which generate a token and are never sparse."""


def prompt_density(found: PrefillSummary) -> float | None:
    """Return the share of query-key pairs that the calls of a prompt computed.

    This is a mean over layers in which a dense call counts as 1. None if there was no call with a prompt.
    """
    shares = []
    for layer in found.layers:
        dense = sum(n for reason, n in layer.dense_calls.items() if reason != DECODE)
        if calls := layer.sparse_calls + dense:
            shares.append(((layer.density or 0.0) * layer.sparse_calls + dense) / calls)
    return sum(shares) / len(shares) if shares else None


def dense_reasons(found: PrefillSummary) -> dict[str, int]:
    """Return the number of dense calls of a prompt over all layers, by reason."""
    total: Counter[str] = Counter()
    for layer in found.layers:
        total.update({k: n for k, n in layer.dense_calls.items() if k != DECODE})
    return dict(total)


def summary_line(found: PrefillSummary | None) -> str:
    """Return a one-line text about the prefill calls.

    Args:
        found: summary of a model; None if sparse prefill was off.
    """
    if found is None:
        return "prefill: dense"
    density, reasons = prompt_density(found), dense_reasons(found)
    why = ", ".join(f"{n} x {reason}" for reason, n in reasons.items()) or "none"
    shown = "not known" if density is None else f"{density:.3f}"
    return (
        f"prefill: {_patterns(found)}, density {shown}, {found.sparse_calls} sparse calls, "
        f"dense calls: {why}"
    )


def _patterns(found: PrefillSummary) -> str:
    """Return the names of all patterns in the settings."""
    deeper = found.config["by_layer"].values()
    names = [found.config["pattern"], *(x if isinstance(x, str) else x["pattern"] for x in deeper)]
    return " and ".join(dict.fromkeys(names))


def cache_line(name: str, done: Any) -> str:
    """Return a one-line text about the KV cache of a generation.

    Args:
        name: name of the cache settings.
        done: a `Generation`.
    """
    size = "" if done.cache_bytes is None else f", {done.cache_bytes / 1e6:.1f} MB"
    read = (
        ""
        if done.read_share is None
        else f", {done.read_share:.0%} of the tokens read for each new one"
    )
    return f"cache: {'transformers' if name == 'none' else name}{size}{read}"
