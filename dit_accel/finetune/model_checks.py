"""`check_model`: check a `FinetuneConfig` against the model, data and machine before weights are read."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from dit_accel.finetune.families import family_name
from dit_accel.sampling.settings import Sampling

OPTIONAL = {
    "train='lora'": ("peft", "pip install dit-accel[train]"),
    "report_to='tensorboard'": ("tensorboard", "pip install dit-accel[train], or report_to='none'"),
    "report_to='wandb'": ("wandb", "pip install wandb"),
    "optimizer='prodigy'": ("prodigyopt", "pip install prodigyopt"),
    "use_8bit_adam=True": ("bitsandbytes", "pip install bitsandbytes"),
    "instance_data_dir": ("av", "pip install dit-accel[train]"),
}
"""Packages that options need, with the command that installs them."""


def check_model(config: Any, outline: Any, *, dry_run: bool = False) -> None:
    """Check a config against the outline of its model. See `FinetuneConfig.check_early`.

    Raises:
        ValueError: if the model or the machine does not support an option.
    """
    model = f"pretrained_model_name_or_path={config.pretrained_model_name_or_path!r}"
    family = family_name(outline, model)
    if config.family not in (None, family):
        raise ValueError(f"family={config.family!r}: {model} belongs to the family {family!r}")
    _check_data(config, dry_run)
    _check_packages(config)
    for frames, height, width in config.sizes if config.precomputed_dir is None else []:
        still = family != "wan" and frames == 1  # image models take no num_frames
        given = {"num_frames": None if still else frames, "height": height, "width": width}
        try:
            outline.check_sizes(**{k: x for k, x in given.items() if x is not None})
        except ValueError as error:
            where = "" if config.buckets is None else f"buckets={config.buckets!r}: "
            raise ValueError(f"{where}{error}") from None
    if config.max_sequence_length is not None:
        outline.check(Sampling(max_sequence_length=config.max_sequence_length))
    _check_layers(config, outline, family)
    if not dry_run:
        _check_processes(config)


def _check_data(config: Any, dry_run: bool) -> None:
    if not dry_run and config.instance_data_dir is config.precomputed_dir is config.prompts is None:
        raise ValueError(
            "instance_data_dir=None, precomputed_dir=None, prompts=None: no data; set one of these options"
        )
    for name in ("instance_data_dir", "precomputed_dir"):
        folder = getattr(config, name)
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{name}={folder!r}: no such folder")
    if config.prompts is not None:
        from dit_accel.sampling.prompt_sets import load_prompts

        load_prompts(config.prompts)
    resumed = config.resume_from_checkpoint
    if resumed not in (None, "latest") and not Path(resumed).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={resumed!r}: no such folder; expected 'latest' or the folder of a checkpoint"
        )
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ValueError(f"output_dir={config.output_dir!r}: is a file; expected a folder")


def _check_packages(config: Any) -> None:
    for option, (package, how) in OPTIONAL.items():
        name, _, value = option.partition("=")
        on = getattr(config, name)
        wanted = on is not None and (not value or repr(on) == value)
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{option}: requires the package {package} ({how})")


def _check_layers(config: Any, outline: Any, family: str) -> None:
    model = outline.transformer.config
    layers = model.num_layers + (model.num_refiner_layers if family == "lumina2" else 0)
    try:
        config.sla_config.check_layers(layers)
    except ValueError as error:
        raise ValueError(f"sla.{error}") from None
    cls = outline.transformer_class
    if config.gradient_checkpointing and not cls._supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing=True: {cls.__name__} of diffusers does not support gradient checkpointing"
        )
    if config.train == "lora" and not hasattr(cls, "add_adapter"):
        raise ValueError(
            f"train='lora': {cls.__name__} of diffusers does not support adapters; use 'all' or 'sla'"
        )


def _check_processes(config: Any) -> None:
    if config.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ValueError(
            "fsdp=True: sharding needs several processes; start them with torchrun, as in finetune/run_8gpu.sh"
        )
