"""Reading of prefill settings from a preset name, a pattern name or a file."""

import os
from pathlib import Path
from typing import Any

from dit_accel.config import PrefillConfig
from dit_accel.config.base import OFF, suggest
from dit_accel.llm.policy import Policy
from dit_accel.llm.prefill import pattern_names

ANY_LAYERS = 1_000
"""Number of layers to assume for an unknown model, so that layer indices pass the check of the settings."""
FILES = (".yaml", ".yml", ".json")


def read_prefill(prefill: Any) -> PrefillConfig | None:
    """Return the settings of sparse prefill; None for dense attention.

    Args:
        prefill: value that `PrefillConfig.load` accepts, or the name of a pattern (with its default options).

    Raises:
        ValueError: the value is not a preset, a pattern, a file or a config.
    """
    if isinstance(prefill, os.PathLike):
        prefill = os.fspath(prefill)
    if not isinstance(prefill, str) or prefill in (*PrefillConfig.PRESETS, OFF):
        config: PrefillConfig | None = PrefillConfig.load(prefill)
        return config
    if prefill in pattern_names(alone=False):
        return PrefillConfig(pattern=prefill)
    if Path(prefill).is_file():
        return PrefillConfig.from_yaml(prefill)
    if prefill.lower().endswith(FILES):
        raise ValueError(
            f"prefill={prefill!r}: no such file; must be the path of a YAML file, or of a JSON file of llm search or "
            "MInference"
        )
    known = [*PrefillConfig.PRESETS, *pattern_names(), OFF]
    raise ValueError(
        f"prefill={prefill!r}: no such preset, pattern or file{suggest(prefill, known)}; must be one of "
        f"{', '.join(known)}, a YAML file, or a JSON file of llm search or MInference"
    )


def prefill_settings(prefill: Any, crossover: int | None = None) -> PrefillConfig | None:
    """Return the settings of sparse prefill, checked without a model; None for dense attention.

    Args:
        prefill: see `read_prefill`.
        crossover: overrides `crossover` of the settings.

    Raises:
        ValueError: the settings are not valid, or `crossover` is given for dense attention.
    """
    config = read_prefill(prefill)
    if config is None:
        if crossover is not None:
            raise ValueError(f"crossover={crossover}: must not be given, because prefill is 'none'")
        return None
    if crossover is not None:
        config = PrefillConfig.from_dict({**vars(config), "crossover": crossover})
    Policy(config, ANY_LAYERS if config.num_layers is None else config.num_layers)
    return config
