"""Detection of step caches of diffusers and of schedulers that add noise, which exclude region-adaptive sampling."""

from collections.abc import Mapping
from typing import Any

from torch import nn

CACHE_MODULES = (
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
)
"""Names of the modules of `diffusers.hooks` whose hooks skip computations in some steps."""
NOISY_CLASSES = (
    "Ancestral",
    "CMStochasticIterative",
    "CogVideoXDPM",
    "ConsistencyDecoder",
    "Cosine",  # DPM-Solver with cosine noise, an SDE
    "DDPM",
    "DPMSolverSDE",
    "LCM",
    "RePaint",
    "SASolver",
    "SCM",
    "ScoreSdeVe",
    "TCD",
    "UnCLIP",
)
"""Parts of the class names of diffusers' schedulers that add noise in every step."""


def step_cache_of(transformer: nn.Module) -> str | None:
    """Return the name of the step cache of diffusers that is on; None if none is on."""
    if getattr(transformer, "is_cache_enabled", False):
        return type(transformer._cache_config).__name__
    for module in transformer.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            if type(hook).__module__.rpartition(".")[2] in CACHE_MODULES:
                return type(hook).__name__
    return None


def noise_of(scheduler: Any) -> str | None:
    """Return the name of a scheduler that adds noise in each step; None if it adds none."""
    if scheduler is None:
        return None
    name = type(scheduler).__name__
    for cls in type(scheduler).__mro__:
        if any(part in cls.__name__ for part in NOISY_CLASSES):
            return name
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        return None
    if config.get("stochastic_sampling"):
        return f"{name}, stochastic_sampling"
    algorithm = str(config.get("algorithm_type", ""))
    return f"{name}, {algorithm}" if algorithm.startswith("sde") else None
