"""`prepare`: install sparse attention on a transformer, and select the parameters to train."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from torch import nn

from dit_accel import control
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.families import trainable_class
from dit_accel.runtime.install import method_of

ADAPTER = "default"
"""Name of the adapter that train="lora" adds."""
DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""Modules whose `weight` has weight decay."""


@dataclass
class Trained:
    """Parameters to train."""

    groups: list[dict[str, Any]]
    """Non-empty optimiser groups with "name", "params", "lr" and "weight_decay". The names are "weights" (matrices of the
    model or of adapters), "biases_norms" (all other parameters of the model) and "sla" (sparse attention)."""
    named: dict[str, nn.Parameter]
    """The same parameters by their name in the transformer, in the order of the groups."""


def prepare(transformer: Any, config: FinetuneConfig) -> Trained:
    """Install sparse attention, add adapters with train="lora", and freeze all parameters that do not train.

    Parameters that receive no gradient are frozen too, because DistributedDataParallel would wait for them: the
    weights of sparse attention in dense layers, and parameters that the model never reads. Trained parameters are
    cast to fp32.

    Args:
        transformer: the transformer of a pipeline, without acceleration.
        config: options of the run.

    Returns:
        The parameters to train, in a fixed order.

    Raises:
        ValueError: if the model is not supported, if it lacks a module of `lora_layers`, or if no parameter trains.
    """
    family = trainable_class(transformer)
    control.enable(transformer, sla=config.sla_config)
    transformer.requires_grad_(config.train == "all")
    if config.train == "lora":
        add_adapters(transformer, config, family.adapted)
    for layer in method_of(transformer, "sla").layers.values():
        layer.module.requires_grad_(layer.scheduled)
    unreached = family.without_gradient(transformer)
    for name, parameter in transformer.named_parameters():
        if any(name.startswith(prefix) for prefix in unreached):
            parameter.requires_grad_(False)
    cast_training_params(transformer, torch.float32)
    trained = _grouped(transformer, config)
    if not trained.named:
        raise ValueError(
            f"train={config.train!r}: no parameter trains, because sla.dense_layers={config.sla['dense_layers']} makes every "
            "layer dense; use fewer dense layers"
        )
    return trained


def add_adapters(transformer: Any, config: FinetuneConfig, default: tuple[str, ...]) -> None:
    """Add low-rank adapters. Their initial output is zero.

    Args:
        transformer: a diffusers model that supports adapters.
        config: options of the run: `rank`, `lora_alpha`, `lora_layers`, and `seed` for the initial values.
        default: names of the modules that get adapters with `lora_layers=None`.

    Raises:
        ValueError: if peft is not installed, or if no linear layer has one of the names.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(
            "train='lora': requires the package peft (pip install dit-accel[train])"
        ) from error
    names = default
    if config.lora_layers is not None:
        names = tuple(x.strip() for x in config.lora_layers.split(","))
        _check_adapted(transformer, names, config.lora_layers)
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        transformer.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(names)), ADAPTER
        )


def _check_adapted(transformer: nn.Module, names: tuple[str, ...], given: str) -> None:
    linear = [n for n, x in transformer.named_modules() if isinstance(x, nn.Linear)]
    for name in names:
        if not any(x == name or x.endswith(f".{name}") for x in linear):
            ends = sorted({x.split(".")[-1] for x in linear if not x[-1].isdigit()})
            raise ValueError(
                f"lora_layers={given!r}: no linear layer is named {name!r}; expected full names or endings of names, "
                f"such as {', '.join(ends)}"
            )


def _grouped(transformer: nn.Module, config: FinetuneConfig) -> Trained:
    own = {
        id(x)
        for layer in method_of(transformer, "sla").layers.values()
        for x in layer.module.parameters()
    }
    found: dict[str, dict[str, nn.Parameter]] = {"weights": {}, "biases_norms": {}, "sla": {}}
    for name, parameter, decays in _parameters(transformer):
        if parameter.requires_grad:
            group = "sla" if id(parameter) in own else "weights" if decays else "biases_norms"
            found[group][name] = parameter
    sla_rate = config.sla_learning_rate
    rates = {"sla": config.learning_rate if sla_rate is None else sla_rate}
    groups = [
        {
            "name": group,
            "params": list(named.values()),
            "lr": rates.get(group, config.learning_rate),
            "weight_decay": config.adam_weight_decay if group == "weights" else 0.0,
        }
        for group, named in found.items()
        if named
    ]
    return Trained(groups, {name: x for named in found.values() for name, x in named.items()})


def _parameters(transformer: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yield (name, parameter, has weight decay) for each distinct parameter."""
    seen = set()
    for prefix, module in transformer.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                matrix = isinstance(module, DECAYED) and name.rpartition(".")[2] == "weight"
                yield name, parameter, matrix
