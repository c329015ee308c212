"""Find the state dict of a model in a checkpoint, and remove key prefixes of wrappers."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

PREFIXES = ("diffusion_model", "dit", "ema", "generator", "model", "module", "net", "transformer")
"""Attribute names that wrappers and training loops use for a model. They may precede a key in any order."""
WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""Attribute names that torch wrappers use for the wrapped module. They may occur anywhere in a key."""
OTHER_NETWORKS = ("critic", "discriminator", "fake_score", "optimizer", "real_score", "teacher")
"""Keys of a checkpoint that hold other networks than the model."""
_DEPTH = 5


def find_state_dict(checkpoint: Any, roots: Collection[str], name: str) -> Mapping[Any, Any]:
    """Return the state dict of a model in a loaded checkpoint.

    The checkpoint is the state dict itself, or holds it under a key such as "model" or "ema".

    Args:
        checkpoint: result of `torch.load`.
        roots: first components of the keys of the model, such as "blocks".
        name: name of the checkpoint in messages.

    Raises:
        ValueError: if the checkpoint holds no state dict of the model, or several of them.
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
            f"{name}: holds several state dicts of this model, under the keys {places}; expected a file with one of them"
        )
    if not found:
        keys = [str(key) for key in checkpoint][:3] if isinstance(checkpoint, Mapping) else []
        raise ValueError(
            f"{name}: holds no state dict of this model"
            + (f" (its first keys: {', '.join(keys)})" if keys else "")
            + f"; expected keys that begin with {', '.join(sorted(roots))}"
        )
    return next(iter(found.values()))


def plain_names(
    weights: Mapping[Any, Any], roots: Collection[str], name: str
) -> dict[str, tuple[str, Any]]:
    """Remove the prefixes of wrappers from the keys of a state dict.

    Args:
        weights: a state dict. Its keys may have prefixes of wrappers.
        roots: first components of the keys of the model.
        name: name of the state dict in messages.

    Returns:
        A dict from the plain key to the original key and the entry.

    Raises:
        ValueError: if a prefix is unknown, or if two keys have the same plain key.
    """
    plain: dict[str, tuple[str, Any]] = {}
    for key, x in weights.items():
        parts = [part for part in str(key).split(".") if part not in WRAPPERS]
        while len(parts) > 1 and parts[0] not in roots and parts[0] in PREFIXES:
            parts = parts[1:]
        root = _root_of(parts, roots)
        if root:
            raise ValueError(
                f"{name}: the prefix {'.'.join(parts[:root])!r} of {key} is unknown; expected {', '.join(PREFIXES)}, "
                f"{', '.join(WRAPPERS)}, or no prefix"
            )
        short = ".".join(parts)
        if short in plain:
            raise ValueError(f"{name}: {short} occurs twice, as {plain[short][0]} and as {key}")
        plain[short] = (str(key), x)
    return plain


def plain_tensors(
    weights: Mapping[str, Tensor], roots: Collection[str], name: str
) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from the keys of a state dict of tensors. See `plain_names`."""
    return {key: x for key, (_, x) in plain_names(weights, roots, name).items()}


def _root_of(parts: list[str], roots: Collection[str]) -> int | None:
    """Return the index of the first component that is in `roots`, or None."""
    return next((i for i, part in enumerate(parts) if part in roots), None)
