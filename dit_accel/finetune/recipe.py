"""Recipes: YAML files with the options of a fine-tuning run, and command-line options that override them."""

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
        "max_sequence_length",  # fixed by the precomputed data
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
"""An override of the key removes the listed options of a recipe, because they would contradict the override."""
TEACHER_OPTIONS = ("num_teacher_samples", "teacher_num_inference_steps", "teacher_guidance_scale")
"""Options that need `prompts`."""
AT_MOST_ALL_STEPS = ("lr_warmup_steps", "anneal_steps")
"""Options that may not exceed `max_train_steps`."""


def recipe_folder() -> Path:
    """Return the folder of the named recipes: an asset of the wheel, or finetune/ in a checkout."""
    try:
        return asset("recipes")
    except FileNotFoundError:
        return Path(__file__).resolve().parents[2] / "finetune"


def recipe_names() -> list[str]:
    """Return the names of the recipes shipped with the package."""
    return sorted(x.stem for x in recipe_folder().glob("*.yaml"))


def find_recipe(source: str | os.PathLike) -> Path:
    """Return the path of a recipe.

    Args:
        source: path of a YAML file, or name of a shipped recipe such as "tiny-wan-sla". An existing file takes
            precedence.

    Raises:
        ValueError: if there is no such file or recipe.
    """
    path = Path(source)
    if path.is_file():
        return path
    names = recipe_names()
    if str(source) in names:
        return recipe_folder() / f"{source}.yaml"
    raise ValueError(
        f"config={str(source)!r}: no such recipe or file{suggest(str(source), names)}; expected "
        f"{', '.join(names)}, or the path of a YAML file"
    )


def read_recipe(source: str | os.PathLike) -> dict[str, Any]:
    """Return the options that a recipe sets.

    Args:
        source: name or path of the recipe, see `find_recipe`.

    Raises:
        ValueError: if there is no such recipe, or if it has an unknown key or an invalid value.
    """
    path = find_recipe(source)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of options of `dit-accel finetune`")
    try:
        FinetuneConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return values


def override(recipe: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe after applying overrides.

    An override also removes options of the recipe that depend on the replaced value (`REPLACES`). For example, a new
    source of data removes the source of the recipe. If `max_train_steps` is smaller than the warm-up or annealing of
    the recipe, these are shortened.

    Args:
        recipe: result of `read_recipe`.
        overrides: options by name. Entries of "sla" replace single fields of `SLAConfig`.
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
    """Return the config of a recipe with overrides.

    Args:
        source: name or path of the recipe, see `find_recipe`.
        overrides: options that replace options of the recipe, see `override`.

    Raises:
        ValueError: if the recipe or an override is invalid.
    """
    return FinetuneConfig.from_dict(override(read_recipe(source), overrides or {}))
