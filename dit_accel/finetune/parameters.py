"""`prepare`: install sparse attention on a transformer, and decide which of its parameters train."""

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
"""Modules whose `weight` decays."""


@dataclass
class Trained:
    """Parameters that train."""

    groups: list[dict[str, Any]]
    """Groups for an optimiser, none of them empty: "name", "params", "lr", "weight_decay". The names are "weights"
    (matrices of the model or of adapters), "biases_norms" (what else of the model trains) and "sla" (sparse
    attention)."""
    named: dict[str, nn.Parameter]
    """The same parameters by their name in the transformer, in the order of the groups."""


def prepare(transformer: Any, config: FinetuneConfig) -> Trained:
    """Install sparse attention, add adapters where asked, and freeze every other parameter.

    Parameters that no loss reaches do not train, so that DistributedDataParallel needs no search for them: the
    weights of sparse attention in dense layers, and those that the model never reads. What trains is cast to fp32.

    Args:
        transformer: the transformer of a pipeline, without acceleration.
        config: options.

    Returns:
        The parameters that train, in a fixed order.

    Raises:
        ValueError: a model that is not supported, modules of `lora_layers` that it does not have, or nothing to
            train.
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
            f"train={config.train!r}: no parameter trains; sla.dense_layers={config.sla['dense_layers']} leaves no layer "
            "sparse"
        )
    return trained


def add_adapters(transformer: Any, config: FinetuneConfig, default: tuple[str, ...]) -> None:
    """Add low-rank adapters, which compute nothing at first.

    Args:
        transformer: a model of diffusers that takes adapters.
        config: `rank`, `lora_alpha` and `lora_layers` are read; the seed decides the initial values.
        default: names of modules for `lora_layers=None`.

    Raises:
        ValueError: no module has one of the names.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(
            "train='lora': needs the package peft (pip install dit-accel[train])"
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
                f"lora_layers={given!r}: no linear layer is called {name!r}; accepted are names or endings of names, "
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
    """Yield name and parameter, each parameter once, and whether it is a matrix that decays."""
    seen = set()
    for prefix, module in transformer.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                matrix = isinstance(module, DECAYED) and name.rpartition(".")[2] == "weight"
                yield name, parameter, matrix
