"""Recipes: named YAML files with the options of a fine-tuning run, and options that override them."""

import os
from pathlib import Path
from typing import Any

from dit_accel.config.base import is_int, read_yaml, suggest
from dit_accel.files import asset
from dit_accel.finetune.config import FinetuneConfig

SIZES = ("height", "width", "num_frames")
REPLACES = {
    "instance_data_dir": ("precomputed_dir", "prompts"),
    "precomputed_dir": (
        *("instance_data_dir", "prompts", *SIZES, "buckets"),
        "max_sequence_length",  # the data has its own
    ),
    "prompts": ("instance_data_dir", "precomputed_dir"),
    "buckets": SIZES,
    "router": ("sla_learning_rate",),
    **dict.fromkeys(SIZES, ("buckets",)),
    "train": ("lora_alpha", "lora_layers"),
    "loss": ("diffusion_weight",),
    "targets": ("guidance_scale", "caption_dropout"),
    "stages": ("regression_topk", "topk_start", "anneal_steps"),
    "lr_scheduler": ("lr_warmup_steps",),
}
"""An override of the first option discards what a recipe says about the others, which would contradict it."""
TEACHER_OPTIONS = ("num_teacher_samples", "teacher_num_inference_steps", "teacher_guidance_scale")
"""Options that need `prompts`."""
AT_MOST_ALL_STEPS = ("lr_warmup_steps", "anneal_steps")
"""Options that may not exceed `max_train_steps`."""


def recipe_folder() -> Path:
    """Return the folder of the named recipes: among the assets of a wheel, else finetune/ of a checkout."""
    try:
        return asset("recipes")
    except FileNotFoundError:
        return Path(__file__).resolve().parents[2] / "finetune"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(x.stem for x in recipe_folder().glob("*.yaml"))


def find_recipe(source: str | os.PathLike) -> Path:
    """Return the path of a recipe.

    Args:
        source: a name ("tiny-wan-sla"), or the path of a YAML file, which goes before a name.

    Raises:
        ValueError: neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    names = recipe_names()
    if str(source) in names:
        return recipe_folder() / f"{source}.yaml"
    raise ValueError(
        f"config={str(source)!r}: no such recipe or file{suggest(str(source), names)}; accepted are "
        f"{', '.join(names)}, or the path of a YAML file"
    )


def read_recipe(source: str | os.PathLike) -> dict[str, Any]:
    """Return the options that a recipe sets.

    Args:
        source: as in `find_recipe`.

    Raises:
        ValueError: no such recipe, or one with an unknown key or a value that is not accepted.
    """
    path = find_recipe(source)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: accepted is a mapping of options of `dit-accel finetune`")
    try:
        FinetuneConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return values


def override(recipe: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe with others in their place.

    An override discards options of the recipe that belong to what it replaces: another source of data, say,
    discards that of the recipe. Fewer steps than the recipe's warm-up or annealing shorten these.

    Args:
        recipe: result of `read_recipe`.
        overrides: options by name; those of "sla" replace single fields.
    """
    merged = dict(recipe)
    for name in overrides:
        for other in REPLACES.get(name, ()):
            if overrides[name] is not None:
                merged.pop(other, None)
    merged |= {name: x for name, x in overrides.items() if name != "sla"}
    if merged.get("prompts") is None:
        for name in TEACHER_OPTIONS:
            if name not in overrides:
                merged.pop(name, None)
    steps = overrides.get("max_train_steps")
    for name in AT_MOST_ALL_STEPS:
        if name not in overrides and is_int(steps) and is_int(merged.get(name)):
            merged[name] = min(merged[name], max(steps, 1))
    merged["sla"] = {**recipe.get("sla", {}), **overrides.get("sla", {})}
    return merged


def load_config(
    source: str | os.PathLike, overrides: dict[str, Any] | None = None
) -> FinetuneConfig:
    """Return the config of a recipe.

    Args:
        source: as in `find_recipe`.
        overrides: options that replace those of the recipe, as in `override`.

    Raises:
        ValueError: a bad recipe or override.
    """
    return FinetuneConfig.from_dict(override(read_recipe(source), overrides or {}))
