"""Create the optimiser of a run."""

from collections.abc import Sequence
from typing import Any

import torch


def make_optimizer(config: Any, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimiser for the settings of a run.

    Args:
        config: settings of the run (`FinetuneConfig`).
        groups: parameter groups with `name`, `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: if the package of the optimiser is not installed.
    """
    options: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    groups = [dict(group) for group in groups]
    if config.optimizer == "prodigy":
        return _imported("prodigyopt", "Prodigy", "optimizer='prodigy'")(groups, **options)
    if config.use_8bit_adam:
        return _imported("bitsandbytes.optim", "AdamW8bit", "use_8bit_adam=True")(groups, **options)
    return torch.optim.AdamW(groups, **options)


def _imported(module: str, name: str, option: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"{option}: requires the package {package} (pip install {package}), which cannot be imported ({error})"
        ) from None
