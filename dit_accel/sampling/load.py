"""Loading of a sparse pipeline by the name of its repository."""

import importlib
import os
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.files import model_source
from dit_accel.sampling.devices import pick_device, pick_dtype
from dit_accel.sampling.settings import Dtype

PIPELINES = {
    "WanPipeline": "wan.SparseWanPipeline",
    "WanImageToVideoPipeline": "wan_i2v.SparseWanImageToVideoPipeline",
    "WanVACEPipeline": "wan_vace.SparseWanVACEPipeline",
    "StableDiffusion3Pipeline": "sd3.SparseStableDiffusion3Pipeline",
    "LuminaPipeline": "lumina.SparseLuminaPipeline",
    "LuminaText2ImgPipeline": "lumina.SparseLuminaPipeline",
    "Lumina2Pipeline": "lumina2.SparseLumina2Pipeline",
    "Lumina2Text2ImgPipeline": "lumina2.SparseLumina2Pipeline",
    "HunyuanVideoPipeline": "hunyuan_video.SparseHunyuanVideoPipeline",
    "LTXPipeline": "ltx.SparseLTXPipeline",
    "CogVideoXPipeline": "cogvideox.SparseCogVideoXPipeline",
    "FluxPipeline": "flux.SparseFluxPipeline",
    "QwenImagePipeline": "qwenimage.SparseQwenImagePipeline",
}
"""Module and class of the sparse pipeline, by the class name in model_index.json."""


def pipeline_class(model: str | os.PathLike, **hub: Any) -> Any:
    """Return the sparse pipeline class of a repository.

    Args:
        model: folder or hub id of a diffusers repository, or the name of an embedded model.
        hub: arguments for the hub, such as `revision`.

    Raises:
        ValueError: the repository cannot be read, or its pipeline is not supported.
    """
    from dit_accel.checkpoint.repository import read_index

    found = read_index(model_source(model), "model", **hub).get("_class_name")
    if found not in PIPELINES:
        raise ValueError(
            f"model={str(model)!r}: contains a {found}; must be one of {', '.join(PIPELINES)}"
        )
    module, name = PIPELINES[found].split(".")
    return getattr(importlib.import_module(f"dit_accel.pipelines.{module}"), name)


def load_pipeline(
    model: str | os.PathLike,
    *,
    sla: SLAConfig | SLACheckpoint | dict | str | None = "balanced",
    ras: RASConfig | dict | str | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    cpu_offload: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a sparse pipeline and move it to a device.

    Args:
        model: folder or hub id of a diffusers repository, or "tiny-wan", "tiny-sd3" or
            "tiny-lumina2".
        sla, ras: acceleration to enable, as in `from_pretrained`.
        device, dtype: see `devices.pick_device` and `devices.pick_dtype`.
        cpu_offload: keep only the component that is running on the device (`enable_model_cpu_offload`).
        kwargs: further arguments of `from_pretrained`, such as `revision`.

    Raises:
        ValueError: an argument is invalid; no weights are read.
    """
    place = pick_device(device)
    source = model_source(model)
    hub = {k: x for k, x in kwargs.items() if k == "revision"}
    pipe: Any = pipeline_class(source, **hub).from_pretrained(
        source, sla=sla, ras=ras, dtype=pick_dtype(dtype, place), **kwargs
    )
    if not cpu_offload:
        return pipe.to(place)
    pipe.enable_model_cpu_offload(device=place)
    return pipe
