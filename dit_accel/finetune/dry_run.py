"""`dry_run`: report options, trained parameters, memory, steps and samples of a run without reading weights."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import init_empty_weights

from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.families import trainable_class
from dit_accel.finetune.families.base import Trainable
from dit_accel.finetune.memory import MemoryEstimate, estimate_memory
from dit_accel.finetune.parameters import Trained, prepare
from dit_accel.finetune.resume import global_batch
from dit_accel.finetune.teacher import cast_weights
from dit_accel.runtime.install import method_of

Size = tuple[int, int, int]
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")


@dataclass(frozen=True)
class DryRun:
    """Result of `dry_run`."""

    config: dict[str, Any]
    """Resolved options."""
    groups: list[dict[str, Any]]
    """Parameter groups of the optimiser: name, tensors, values, learning rate, weight decay."""
    parameters: int
    """Number of values in the transformer, including sparse attention and adapters."""
    memory: MemoryEstimate
    """Memory of one device."""
    sizes: list[Size]
    """Sizes (frames, height, width) of the samples in pixels. The memory is estimated for the largest size."""
    own_sizes: bool
    """True if each file keeps its own size. `sizes` is then only an example."""
    samples: int | None
    """Number of samples; None without data."""
    processes: int
    """Number of processes."""

    @property
    def batch(self) -> int:
        """Number of samples per optimiser step over all processes."""
        return global_batch(self.config, self.processes)

    @property
    def steps(self) -> dict[str, int]:
        """Number of optimiser steps of each stage."""
        counts = {"regression": "regression_steps", "distillation": "max_train_steps"}
        return {stage: self.config[counts[stage]] for stage in self.config["stages"]}

    def to_dict(self) -> dict[str, Any]:
        """Return all values as a dict for JSON."""
        return {
            "config": self.config,
            "groups": self.groups,
            "parameters": self.parameters,
            "memory_bytes": self.memory.to_dict(),
            "sizes": [list(x) for x in self.sizes],
            "own_sizes": self.own_sizes,
            "samples": self.samples,
            "steps": self.steps,
            "batch": self.batch,
            "processes": self.processes,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        import yaml

        yield "options"
        yield from _indented(yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        trained = sum(x["values"] for x in self.groups)
        share = 100 * trained / self.parameters
        yield f"parameters: {trained:,} of {self.parameters:,} train ({share:.3g} %)"
        yield f"  {'group':13}{'tensors':>8}{'values':>16}{'learning rate':>15}{'weight decay':>14}"
        for x in self.groups:
            rates = f"{x['learning_rate']:>15g}{x['weight_decay']:>14g}"
            yield f"  {x['name']:13}{x['tensors']:>8}{x['values']:>16,}{rates}"
        yield f"estimated memory per device (number of devices: {self.processes})"
        for name, value in self.memory.to_dict().items():
            yield f"  {name:13}{value / 2**30:>10.3f} GiB"
        stages = ", ".join(f"{name} {count}" for name, count in self.steps.items())
        sizes = ", ".join("x".join(map(str, x)) for x in self.sizes)
        yield f"steps: {stages}, with {self.batch} samples each"
        count = "none given" if self.samples is None else f"{self.samples:,} samples"
        of = "vary by file; memory estimated for" if self.own_sizes else ""
        yield f"data: {count}, frames x height x width {of} {sizes}".replace("  ", " ")


def dry_run(config: FinetuneConfig) -> DryRun:
    """Return a report of the run that these options describe.

    Args:
        config: options of the run.

    Raises:
        ValueError: if the model, the data or this machine does not support an option.
    """
    from dit_accel.files import model_source
    from dit_accel.sampling.outline import read_outline

    source = model_source(config.pretrained_model_name_or_path)
    outline = read_outline(source, **config.hub)
    config.check_early(outline, dry_run=True)
    found = None if config.precomputed_dir is None else _precomputed(config.precomputed_dir)
    sizes = complete_sizes(config, outline) if found is None else found[1]
    trainable = empty_trainable(config, outline, source)
    model = trainable.transformer
    trained = prepare(model, config)
    for layer in method_of(model, "sla").layers.values():
        layer.module.calibrated = True  # meta tensors have no values to calibrate with
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    encodes = found is None or config.validation_prompts is not None
    memory = estimate_memory(
        trainable,
        trained,
        config,
        size=max(sizes, key=lambda x: x[0] * x[1] * x[2]),
        encoders=encoder_bytes(source, config) if encodes else 0,
        processes=processes,
    )
    return DryRun(
        config=config.to_dict(),
        groups=_rows(trained),
        parameters=sum(x.numel() for x in model.parameters()),
        memory=memory,
        sizes=sizes,
        own_sizes=config.instance_data_dir is not None and None in config.sizes[0],
        samples=_samples(config) if found is None else found[0],
        processes=processes,
    )


def _rows(trained: Trained) -> list[dict[str, Any]]:
    return [
        {
            "name": x["name"],
            "tensors": len(x["params"]),
            "values": sum(p.numel() for p in x["params"]),
            "learning_rate": x["lr"],
            "weight_decay": x["weight_decay"],
        }
        for x in trained.groups
    ]


def complete_sizes(config: FinetuneConfig, outline: Any) -> list[Size]:
    """Return the sizes of the samples. Unset sizes take the default of the pipeline."""
    from dit_accel.files import EMBEDDED_MODELS
    from dit_accel.finetune.data.open import default_size

    embedded = config.pretrained_model_name_or_path in EMBEDDED_MODELS
    defaults = {"num_frames": 1, **default_size(outline.pipeline, outline, embedded=embedded)}
    names = ("num_frames", "height", "width")
    return [
        tuple(defaults[name] if x is None else x for name, x in zip(names, size, strict=True))  # type: ignore[misc]
        for size in config.sizes
    ]


def empty_trainable(config: FinetuneConfig, outline: Any, source: Any) -> Trainable:
    """Return the model of a repository on the meta device, without weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.configuration_utils import FrozenDict

    from dit_accel.sampling.devices import DTYPES

    cls = outline.transformer_class
    with init_empty_weights(include_buffers=True):
        model = cls.from_config(cls.load_config(str(source), subfolder="transformer", **config.hub))
    cast_weights(model, DTYPES[config.weights_dtype])
    # `load_config` reads the settings of every scheduler class.
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(
        str(source), subfolder="scheduler", **config.hub
    )
    pipe = SimpleNamespace(
        transformer=model,
        scheduler=SimpleNamespace(config=FrozenDict(scheduler)),
        **outline.facts,
    )
    return trainable_class(model)(pipe, max_sequence_length=config.max_sequence_length)


def encoder_bytes(source: Any, config: FinetuneConfig) -> int:
    """Return the bytes of the text encoders in the dtype of the computation and of the VAE in fp32."""
    import diffusers
    import transformers

    from dit_accel.checkpoint.repository import read_index

    hub: Any = config.hub
    index = read_index(source, "pretrained_model_name_or_path", **hub)
    total = 0
    for name in ENCODERS:
        library, class_name = index.get(name) or (None, None)
        if class_name is None:
            continue
        with init_empty_weights(include_buffers=True):
            if library == "transformers":
                cls = getattr(transformers, class_name)
                settings = cls.config_class.from_pretrained(str(source), subfolder=name, **hub)
                model = cls(settings)
            else:
                cls = getattr(diffusers, class_name)
                model = cls.from_config(cls.load_config(str(source), subfolder=name, **hub))
        itemsize = 4 if name == "vae" or config.mixed_precision == "no" else 2
        total += itemsize * sum(x.numel() for x in model.parameters())
    return total


def _precomputed(folder: str) -> tuple[int, list[Size]]:
    """Return the number of samples in a precomputed folder and their sizes."""
    from dit_accel.finetune.data.store import open_store

    buckets = open_store(folder).buckets
    sizes = sorted({tuple(map(int, x.split("x"))) for x in buckets})
    return len(buckets), sizes  # type: ignore[return-value]


def _samples(config: FinetuneConfig) -> int | None:
    if config.prompts is not None:
        from dit_accel.sampling.prompt_sets import load_prompts

        return config.num_teacher_samples or len(load_prompts(config.prompts))
    if config.instance_data_dir is None:
        return None
    from dit_accel.finetune.data.captions import read_captions

    columns = {"caption_column": config.caption_column, "video_column": config.video_column}
    return len(read_captions(Path(config.instance_data_dir), **columns))


def _indented(text: str) -> Iterator[str]:
    return (f"  {line}" for line in text.splitlines())
