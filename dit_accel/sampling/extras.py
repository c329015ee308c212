"""Optional changes to a loaded pipeline: another scheduler, LoRA weights, compiled blocks."""

import difflib
import importlib.util
import inspect
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.models import family_of
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.devices import pick_device
from dit_accel.sampling.outline import Outline
from dit_accel.sampling.quantize import quantized_as

LORA_FILE = "pytorch_lora_weights.safetensors"
NEEDED = {
    "LuminaPipeline": {"sigmas"},
    "Lumina2Pipeline": {"sigmas", "mu"},
    "HunyuanVideoPipeline": {"sigmas"},
    "LTXPipeline": {"sigmas", "mu"},
    "FluxPipeline": {"mu"},
    "QwenImagePipeline": {"sigmas", "mu"},
}
"""Arguments that a diffusers pipeline passes to `set_timesteps`, by class name of the pipeline."""
PREDICTS_V = ("CogVideoXPipeline",)
"""Class names of diffusers pipelines whose models predict v. Flow-matching schedulers cannot run them."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Lora:
    """LoRA weights and their scale."""

    source: str
    """Path of a safetensors file, or hub id."""
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Checked changes to a pipeline."""

    scheduler: Any = None
    """Scheduler class of diffusers. None: scheduler of the repository."""
    loras: tuple[Lora, ...] = ()
    compile: bool = False


def check_extras(
    outline: Outline,
    *,
    scheduler: str | None = None,
    loras: Sequence[str] = (),
    compile: bool = False,  # noqa: A002  # the name of the option
    device: str = "auto",
) -> Extras:
    """Check the changes before the model is loaded.

    Args:
        outline: outline of the repository that will be loaded.
        scheduler: class name of a diffusers scheduler that supports flow matching.
        loras: safetensors files, folders with one safetensors file, or hub ids, each with an optional `:scale`.
        compile: compile the repeated blocks of the transformer with `torch.compile`.
        device: device of the run, see `devices.pick_device`.

    Raises:
        ValueError: the scheduler is unknown or does not fit the model, LoRA weights cannot be read or belong to another
            model, or the blocks cannot be compiled (see `check_compile`).
        ImportError: LoRA weights are given and PEFT is not installed.
    """
    if compile:
        check_compile(outline, device)
    chosen = None if scheduler is None else scheduler_class(scheduler, outline)
    return Extras(
        scheduler=chosen,
        loras=tuple(_checked_lora(x, outline) for x in loras),
        compile=compile,
    )


def prepare(pipe: Any, extras: Extras) -> dict[str, Any]:
    """Apply checked changes to a loaded pipeline.

    Returns:
        The applied changes as plain values for a sidecar, with "quantize" if the transformer is quantised.
    """
    done: dict[str, Any] = {}
    if extras.scheduler is not None:
        pipe.scheduler = _flow_scheduler(extras.scheduler, pipe.scheduler.config)
        done["scheduler"] = extras.scheduler.__name__
    if extras.loras:
        names = [f"lora_{i}" for i in range(len(extras.loras))]
        for name, lora in zip(names, extras.loras, strict=True):
            pipe.load_lora_weights(lora.source, adapter_name=name, use_safetensors=True)
        pipe.set_adapters(names, [x.scale for x in extras.loras])
        done["lora"] = [{"source": x.source, "scale": x.scale} for x in extras.loras]
    if extras.compile:
        compile_blocks(pipe)
        done["compile"] = True
    if (quantized := quantized_as(transformers_of(pipe)[0])) is not None:
        done["quantize"] = quantized
    return done


def check_compile(outline: Outline, device: str = "auto") -> None:
    """Check that the blocks of the transformer can be compiled.

    Raises:
        ValueError: the repeated blocks of the transformer class are unknown, or the device is a CPU and there is no C++
            compiler.
    """
    cls = outline.transformer_class
    if not family_of(outline.transformer).blocks_of(cls):
        raise ValueError(f"compile=True: the repeated blocks of {cls.__name__} are unknown")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if pick_device(device).type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile=True: torch.compile needs a C++ compiler on a CPU, and {compiler} was not found; install it or set CXX"
        )


def compile_blocks(pipe: Any) -> None:
    """Compile each repeated block of the transformers with `torch.compile`."""
    for transformer in transformers_of(pipe):
        for block in family_of(transformer).blocks(transformer):
            block.compile()


def scheduler_class(name: str, outline: Outline) -> Any:
    """Return the diffusers scheduler class with this name.

    Raises:
        ValueError: diffusers has no such scheduler, it does not support flow matching, the model does not predict flow
            (CogVideoX), or its `set_timesteps` does not take the arguments that the pipeline passes.
    """
    import diffusers

    parent = outline.pipeline._parent
    if parent in PREDICTS_V:
        raise ValueError(
            f"scheduler={name!r}: the model of {parent} predicts v and supports no flow-matching scheduler; must be None, which "
            "keeps the scheduler of the repository"
        )
    names = [x for x in dir(diffusers) if x.endswith("Scheduler")]
    accepted = [x for x in names if _is_flow(getattr(diffusers, x))]
    if name not in accepted:
        close = difflib.get_close_matches(name, accepted, n=1)
        why = "does not support flow matching" if name in names else "not a scheduler of diffusers"
        hint = f" (did you mean {close[0]!r}?)" if close and name not in names else ""
        raise ValueError(f"scheduler={name!r}: {why}{hint}; must be one of {', '.join(accepted)}")
    needed = NEEDED.get(parent, set())
    missing = {
        x: needed - {*inspect.signature(getattr(diffusers, x).set_timesteps).parameters}
        for x in accepted
    }
    if missing[name]:
        raise ValueError(
            f"scheduler={name!r}: does not take {', '.join(sorted(missing[name]))}, which {parent} passes; must be one of "
            f"{', '.join(x for x in accepted if not missing[x])}"
        )
    return getattr(diffusers, name)


def _is_flow(cls: Any) -> bool:
    """Return whether a scheduler can run a flow-matching model from noise to image in one stage."""
    if re.search(r"Inverse|^Helios", cls.__name__):
        return False
    return (
        cls.__name__.startswith("FlowMatch")
        or "use_flow_sigmas" in inspect.signature(cls.__init__).parameters
    )


def _flow_scheduler(cls: Any, config: Any) -> Any:
    """Build a scheduler from the config of another one. diffusers names the shift `shift` or `flow_shift`."""
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if "use_flow_sigmas" in inspect.signature(cls.__init__).parameters:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        return cls.from_config(config, **flow, flow_shift=shift)
    return cls.from_config(config, shift=shift)


def _checked_lora(text: str, outline: Outline) -> Lora:
    """Read LoRA weights, so that an unusable file is rejected before the model is loaded."""
    where = f"lora={text!r}"
    source, scale = _split_scale(text)
    if not math.isfinite(scale):
        raise ValueError(f"{where}: the scale after the colon must be a finite number")
    cls = outline.pipeline
    if len(outline.transformers) > 1:
        raise ValueError(
            f"{where}: the model has two transformers (Wan2.2), and LoRA weights belong to one of them; load them in Python with "
            "pipe.load_lora_weights(..., load_into_transformer_2=True or False)"
        )
    if not hasattr(cls, "lora_state_dict"):
        raise ValueError(f"{where}: diffusers does not support LoRA for {cls._parent}")
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{where}: needs the package peft; pip install peft")
    source = _lora_file(source, where)
    try:
        weights = cls.lora_state_dict(source, use_safetensors=True)
    except Exception as error:  # safetensors, the hub and the format converters raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where}: cannot read LoRA weights ({reason})") from None
    if not weights or not all("lora" in x for x in weights):
        raise ValueError(f"{where}: contains weights that are not LoRA weights")
    if not any(x.startswith("transformer.") for x in weights):
        raise ValueError(f"{where}: contains no LoRA weights of a transformer")
    return Lora(source, scale)


def _split_scale(text: str) -> tuple[str, float]:
    """Split `source:scale`. The scale is 1 if it is not given."""
    source, colon, scale = text.rpartition(":")
    if colon and source and not Path(text).exists():
        try:
            return source, float(scale)
        except ValueError:
            pass  # the colon is part of the name
    return text, 1.0


def _lora_file(source: str, where: str) -> str:
    """Return the path of the safetensors file of a file or folder, or the hub id.

    Raises:
        ValueError: there is no such file, or the folder has several; the message begins with `where`.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{where}: must be a .safetensors file")
        return source
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if path / LORA_FILE in found:
            return str(path / LORA_FILE)
        if len(found) != 1:
            names = ", ".join(x.name for x in found) or "none"
            raise ValueError(
                f"{where}: folder with these safetensors files: {names}; must contain {LORA_FILE} or exactly one file"
            )
        return str(found[0])
    if not _HUB_ID.fullmatch(source) or path.suffix == ".safetensors":
        raise ValueError(
            f"{where}: no such file or folder; must be a .safetensors file, a folder with one, or a hub id, "
            "with an optional :scale"
        )
    return source
