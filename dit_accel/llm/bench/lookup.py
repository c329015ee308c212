"""`retrieval_row`: accuracy of the handwritten model on each retrieval task, for one row of the benchmark table."""

from typing import Any

from dit_accel.config import PrefillConfig
from dit_accel.llm.bench import retrieval
from dit_accel.llm.control import disable, enable, summary

DENSITY = "density"
"""Key of the density in the results, beside the names of the tasks."""


def retrieval_row(
    wired: Any,
    config: PrefillConfig | None,
    lengths: tuple[int, ...],
    *,
    prompts: int,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Return the accuracy of each task and the density of the sparse calls, by prompt length.

    Args:
        wired: model from `wired_model()`; it is disabled afterwards.
        config: settings of sparse prefill; None for dense.
        lengths: prompt lengths in tokens.
        prompts: number of prompts per task.
        seed: random seed of the prompts.

    Returns:
        Results by prompt length. Lengths are strings, because JSON keys must be. Values are None if no call was sparse.
    """
    return {
        str(length): _at_length(wired, config, length, prompts=prompts, seed=seed)
        for length in lengths
    }


def _at_length(
    wired: Any, config: PrefillConfig | None, length: int, *, prompts: int, seed: int
) -> dict[str, float | None]:
    if config is not None and config.num_layers is not None:
        # The settings are for the layers and heads of another model.
        return dict.fromkeys([*retrieval.TASKS, DENSITY])
    if config is not None:
        enable(wired, prefill=_for_two_layers(config))
    try:
        found: dict[str, float | None] = {
            task: retrieval.accuracy(wired, task, length, prompts=prompts, seed=seed)
            for task in retrieval.TASKS
        }
        if config is None:
            return {**found, DENSITY: 1.0}
        layers = summary(wired).layers
    finally:
        disable(wired)
    if not any(layer.sparse_calls for layer in layers):
        return dict.fromkeys([*found, DENSITY])
    densities = [1.0 if layer.density is None else layer.density for layer in layers]
    return {**found, DENSITY: sum(densities) / len(densities)}


def _for_two_layers(config: PrefillConfig) -> PrefillConfig:
    """Return the settings without dense layers and layer indices, because the handwritten model has only two layers."""
    shares = {k: x for k, x in config.by_layer.items() if isinstance(k, float)}
    return PrefillConfig.from_dict({**vars(config), "dense_layers": 0, "by_layer": shares})
