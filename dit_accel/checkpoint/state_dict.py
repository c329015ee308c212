"""Find one model's state dict in a checkpoint, and remove the prefixes that wrappers put on its keys."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

PREFIXES = ("diffusion_model", "dit", "ema", "generator", "model", "module", "net", "transformer")
"""Names under which wrappers and training loops hold a model; they may stand in front, in any order."""
WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""Names that torch's wrappers give to the module inside; they may stand anywhere in a key."""
OTHER_NETWORKS = ("critic", "discriminator", "fake_score", "optimizer", "real_score", "teacher")
"""Keys of a checkpoint that never hold the model itself."""
_DEPTH = 5


def find_state_dict(checkpoint: Any, roots: Collection[str], name: str) -> Mapping[Any, Any]:
    """Return the state dict of a model from what `torch.load` returned.

    The checkpoint is the state dict itself, or holds it under a key such as "model" or "ema".

    Args:
        checkpoint: the loaded object.
        roots: first components of the model's own keys, such as "blocks".
        name: how messages call the checkpoint.

    Raises:
        ValueError: no dict with keys of the model, or several of them.
    """
    found: dict[tuple[str, ...], Mapping[Any, Any]] = {}

    def look(value: Any, path: tuple[str, ...]) -> None:
        if not isinstance(value, Mapping) or len(path) > _DEPTH:
            return
        if any(_root_of(str(key).split("."), roots) is not None for key in value):
            found[path] = value
            return
        for key, inner in value.items():
            look(inner, (*path, str(key)))

    look(checkpoint, ())
    if len(found) > 1:
        wanted = {path: x for path, x in found.items() if not set(path) & set(OTHER_NETWORKS)}
        found = wanted or found
    if len(found) > 1:
        places = ", ".join(repr(".".join(path)) for path in found)
        raise ValueError(
            f"{name}: holds several state dicts of this model, under the keys {places}; accepted is a file with one "
            "of them"
        )
    if not found:
        keys = [str(key) for key in checkpoint][:3] if isinstance(checkpoint, Mapping) else []
        raise ValueError(
            f"{name}: holds no state dict of this model"
            + (f" (its first keys: {', '.join(keys)})" if keys else "")
            + f"; accepted are keys that begin with {', '.join(sorted(roots))}"
        )
    return next(iter(found.values()))


def plain_names(
    weights: Mapping[Any, Any], roots: Collection[str], name: str
) -> dict[str, tuple[str, Any]]:
    """Return the entries of a state dict under the names that the unwrapped model has.

    Args:
        weights: a state dict; its keys may have prefixes of wrappers.
        roots: first components of the model's own keys.
        name: how messages call the state dict.

    Returns:
        By plain name: the key that the entry had, and the entry.

    Raises:
        ValueError: a prefix is unknown, or two keys have the same plain name.
    """
    plain: dict[str, tuple[str, Any]] = {}
    for key, x in weights.items():
        parts = [part for part in str(key).split(".") if part not in WRAPPERS]
        while len(parts) > 1 and parts[0] not in roots and parts[0] in PREFIXES:
            parts = parts[1:]
        root = _root_of(parts, roots)
        if root:
            raise ValueError(
                f"{name}: the prefix {'.'.join(parts[:root])!r} of {key} is unknown; accepted are {', '.join(PREFIXES)}, "
                f"{', '.join(WRAPPERS)}, or none"
            )
        short = ".".join(parts)
        if short in plain:
            raise ValueError(f"{name}: {short} is there twice, as {plain[short][0]} and as {key}")
        plain[short] = (str(key), x)
    return plain


def plain_tensors(
    weights: Mapping[str, Tensor], roots: Collection[str], name: str
) -> dict[str, Tensor]:
    """Return the result of `plain_names` without the keys that the entries had."""
    return {key: x for key, (_, x) in plain_names(weights, roots, name).items()}


def _root_of(parts: list[str], roots: Collection[str]) -> int | None:
    """The index of the first component that begins a name of the model; None: none does."""
    return next((i for i, part in enumerate(parts) if part in roots), None)
