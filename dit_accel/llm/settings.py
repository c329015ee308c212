"""Settings of sparse prefill by what a user calls them: a preset, a pattern, a file."""

import os
from pathlib import Path
from typing import Any

from dit_accel.config import PrefillConfig
from dit_accel.config.base import OFF, suggest
from dit_accel.llm.policy import Policy
from dit_accel.llm.prefill import pattern_names

ANY_LAYERS = 1_000
"""Layers of a model that is not known yet: names and options of patterns are checked, layer indices pass."""
FILES = (".yaml", ".yml", ".json")


def read_prefill(prefill: Any) -> PrefillConfig | None:
    """Return settings; None for dense attention.

    Args:
        prefill: what `PrefillConfig.load` accepts, or the name of a pattern, which stands for its default options.

    Raises:
        ValueError: no such settings.
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
            f"prefill={prefill!r}: no such file; accepted is the path of a YAML file, or of a JSON file of llm search or "
            "MInference"
        )
    known = [*PrefillConfig.PRESETS, *pattern_names(), OFF]
    raise ValueError(
        f"prefill={prefill!r}: no such preset, pattern or file{suggest(prefill, known)}; accepted are "
        f"{', '.join(known)}, a YAML file, or a JSON file of llm search or MInference"
    )


def prefill_settings(prefill: Any, crossover: int | None = None) -> PrefillConfig | None:
    """Return settings that are checked as far as they can be without a model; None for dense attention.

    Args:
        prefill: see `read_prefill`.
        crossover: overrides that of the settings.

    Raises:
        ValueError: no such settings, or `crossover` without sparse attention.
    """
    config = read_prefill(prefill)
    if config is None:
        if crossover is not None:
            raise ValueError(
                f"crossover={crossover}: prefill is 'none'; accepted with sparse prefill"
            )
        return None
    if crossover is not None:
        config = PrefillConfig.from_dict({**vars(config), "crossover": crossover})
    Policy(config, ANY_LAYERS if config.num_layers is None else config.num_layers)
    return config
