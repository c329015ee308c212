"""Readers of JSON files with a pattern for each head, written by `dit-accel llm search` or by MInference's search."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel.config.base import is_int

DENSE = "dense"
"""Pattern name of layers and heads that read every key."""
FORMAT_VERSION = 1
KIND = "llm-search"
BLOCK = 64
"""Number of tokens per block in MInference's files."""
SHARE = 1e-6
"""Share of keys or blocks that rounds to at most one, so that only the counts of a file have an effect."""
LEGACY_DEFAULT = ("vertical_and_slash", 1000, 6096)
"""Pattern of the heads that a file of MInference does not name."""
LEGACY_BLOCKS = 100
"""Number of key blocks of each row in MInference's block_sparse, which ignores the numbers of the file."""


def settings_of_file(path: Path) -> dict[str, Any] | None:
    """Return fields of `PrefillConfig` from a JSON file with a pattern for each head, or None for other files.

    Raises:
        ValueError: the JSON file is not valid; the message names the file.
    """
    if path.suffix.lower() != ".json":
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    try:
        if isinstance(data, list):
            return legacy_settings(data)
        if isinstance(data, dict) and data.get("kind") == KIND:
            return search_settings(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return None


def search_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `PrefillConfig` from a result of `dit-accel llm search`.

    Raises:
        ValueError: the format version is not known, or an entry is missing or inconsistent.
    """
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version={version!r}: accepted is {FORMAT_VERSION}")
    candidates, chosen = data.get("candidates"), data.get("chosen")
    if not isinstance(candidates, dict) or not isinstance(chosen, list) or not chosen:
        raise ValueError("candidates, chosen: accepted are a mapping of patterns and a list of layers")  # fmt: skip
    by, counts = data.get("by"), {"head": data.get("heads"), "group": data.get("kv_heads")}
    if by not in counts or not is_int(counts[by]):
        raise ValueError(f"by={by!r}: accepted are head and group, with heads and kv_heads")
    for layer, names in enumerate(chosen):
        if isinstance(names, list) and len(names) != counts[by]:
            raise ValueError(
                f"chosen[{layer}]: {len(names)} entries; accepted are {counts[by]}, one for each {by}"
            )
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or (name not in candidates and name != DENSE):
                raise ValueError(
                    f"chosen[{layer}]: {name!r} is no candidate; accepted are {', '.join(candidates)}"
                )
    if data.get("layers") != len(chosen):
        raise ValueError(
            f"layers={data.get('layers')!r}: chosen has {len(chosen)} layers; accepted are equal numbers"
        )
    return {
        "by_layer": {i: layer_setting(x, candidates, by) for i, x in enumerate(chosen)},
        "pattern": DENSE,
        "num_layers": len(chosen),
        **{name: data[name] for name in ("block", "tail") if name in data},
    }


def layer_setting(names: str | Sequence[str], candidates: Mapping[str, Any], by: str) -> Any:
    """Return the value of `PrefillConfig.by_layer` for one layer.

    Args:
        names: name of the chosen candidate of each head or group; one entry if all have the same.
        candidates: pattern and options by candidate name.
        by: "head" if `names` has an entry for each query head, "group" for each head of keys.
    """
    used = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if len(used) == 1:  # one pattern for all heads, so no plans are joined
        return candidates.get(used[0], DENSE)
    choices = {name: candidates[name] for name in used if name in candidates}
    return {"pattern": "by_head", "options": {"heads": list(names), "choices": choices, "by": by}}


def legacy_settings(layers: Sequence[Any]) -> dict[str, Any]:
    """Return fields of `PrefillConfig` from a file of MInference: a list over layers of `{"0": [name, a, b, score]}`.

    The numbers of keys do not depend on the prompt length. n slashes become ceil(n / 64) bands of 64 neighbouring
    distances, because the pattern `vertical_slash` of this package selects bands.

    Raises:
        ValueError: an entry is not valid; the message names layer and head.
    """
    heads = 0
    for layer, entries in enumerate(layers):
        if not isinstance(entries, dict) or not all(str(x).isdecimal() for x in entries):
            raise ValueError(f"layer {layer}: accepted is a mapping from heads to patterns")
        heads = max([heads, *(int(x) + 1 for x in entries)])
    if not heads:
        raise ValueError("no layer names a head; accepted is a list over layers of heads")
    by_layer = {}
    for layer, entries in enumerate(layers):
        choices: dict[str, Any] = {}
        names = []
        for head in range(heads):
            entry = entries.get(str(head), LEGACY_DEFAULT)
            name, value = _legacy_pattern(entry, f"layer {layer}, head {head}")
            choices[name] = value
            names.append(name)
        by_layer[layer] = {
            "pattern": "by_head",
            "options": {"heads": names, "choices": choices, "by": "head"},
        }
    return {"by_layer": by_layer, "pattern": DENSE, "num_layers": len(layers), "block": BLOCK}


def _legacy_pattern(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return a candidate name for an entry of MInference, and the equivalent pattern of this package."""
    ok = isinstance(entry, list | tuple) and len(entry) >= 3 and isinstance(entry[0], str)
    if not ok or not all(is_int(x) and x >= 0 for x in entry[1:3]):
        raise ValueError(f"{where}: {entry!r}; accepted is [name, int, int, score]")
    name, first, second = entry[:3]
    if name == "vertical_and_slash":
        options: dict[str, Any] = {
            "columns": SHARE,
            "min_columns": max(first, 30),
            "slashes": SHARE,
            "min_slashes": -(-max(second, 50) // BLOCK),
        }
        return f"{name} {first} {second}", {"pattern": "vertical_slash", "options": options}
    if name == "stream_llm":
        # MInference's stream_llm is an A-shape. `triangle` reads whole blocks, so it reads slightly more keys, and its last
        # rows read every key.
        options = {"sink": first, "window": max(second, 1)}
        return f"{name} {first} {second}", {"pattern": "triangle", "options": options}
    if name == "block_sparse":
        options = {"top_p": None, "count": LEGACY_BLOCKS, "spread": False}
        return name, {"pattern": "blocks", "options": options}
    raise ValueError(
        f"{where}: pattern {name!r}; accepted are vertical_and_slash, stream_llm and block_sparse"
    )
