"""`enable_parallelism`: context parallelism, also on CPUs and for models without a plan in diffusers."""

import copy
from typing import Any

import torch
import torch.distributed as dist

from dit_accel.models import family_of, is_supported
from dit_accel.runtime.components import parts_of
from dit_accel.runtime.install import installation_of
from dit_accel.runtime.parallel.group import Group
from dit_accel.runtime.parallel.switch import knows_parallelism
from dit_accel.runtime.target import transformer_of


def enable_parallelism(target: Any, *, config: Any) -> None:
    """Split each call of a transformer among processes, like `transformer.enable_parallelism` of diffusers.

    This also works on CPUs, and for models without a context-parallel plan in diffusers. Every process runs the same
    pipeline call with the same arguments and seeds, and gets the same result.

    Args:
        target: a pipeline or transformer that `enable` accepts. Call `enable` first if diffusers does not support context
            parallelism of the model.
        config: `diffusers.ContextParallelConfig(ulysses_degree=n)`; `ulysses_anything=True` accepts a number of heads
            that n does not divide. The number of tokens may be any.

    Raises:
        RuntimeError: torch.distributed is not initialised, or parallelism is on already.
        ValueError: the degree is not the number of processes, the heads cannot be split, ring attention is asked for, or
            acceleration has to be on first.

    Example:
        >>> torch.distributed.init_process_group()  # under torchrun --nproc-per-node 2
        >>> pipe = SparseWanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").to(rank)
        >>> dit_accel.enable_parallelism(pipe, config=ContextParallelConfig(ulysses_degree=2))
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: start with torchrun --nproc-per-node N and call "
            "torch.distributed.init_process_group() first"
        )
    context = getattr(config, "context_parallel_config", config)
    degree, ring = getattr(context, "ulysses_degree", None), getattr(context, "ring_degree", None)
    if degree is None or (ring or 1) > 1:
        raise ValueError(
            f"config: {type(context).__name__} with ulysses_degree={degree} and ring_degree={ring}; accepted is "
            "diffusers.ContextParallelConfig(ulysses_degree=...), without a ring"
        )
    world = dist.get_world_size()
    if context.mesh is None and degree != world:
        raise ValueError(
            f"ulysses_degree={degree}: there are {world} processes; accepted is {world}, or a mesh"
        )
    if context.mesh is not None:
        sizes = dict(zip(context.mesh.mesh_dim_names or (), context.mesh.shape, strict=False))
        if sizes.get("ulysses") != degree or sizes.get("ring") != 1:
            raise ValueError(
                f"ulysses_degree={degree}: the mesh has the dimensions {sizes}; accepted is a mesh with a dimension "
                f"'ulysses' of {degree} and a dimension 'ring' of 1"
            )
    transformers: list[Any] = [
        transformer_of(part, any_model=True) for part in parts_of(target).values()
    ]
    for transformer in transformers:
        _check(transformer, degree, bool(context.ulysses_anything))
    for transformer in transformers:
        own = copy.copy(context)  # diffusers writes into it
        if _on_accelerators():
            if transformer._cp_plan is None:
                transformer._cp_plan = {}
            transformer.enable_parallelism(config=own)
        else:
            _on_cpus(transformer, own)
        installed = installation_of(transformer)
        if installed is not None:
            installed.follow_parallelism(transformer)


def _check(transformer: Any, degree: int, anything: bool) -> None:
    """Refuse a transformer before anything is changed."""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise RuntimeError("transformer: parallelism is on already, and diffusers cannot change it")
    if not is_supported(transformer):
        return
    layers = family_of(transformer).self_attention(transformer)
    if installation_of(transformer) is None and not knows_parallelism(transformer, layers):
        raise ValueError(
            f"target: diffusers does not support context parallelism of {type(transformer).__name__}; accepted after "
            "dit_accel.enable(...)"
        )
    for name, layer in layers.items():
        Group(None, 0, degree, anything).check_heads(name, layer.kv_heads)


def _on_accelerators() -> bool:
    """Return whether the process group can send tensors of accelerators."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type in dist.get_backend_config()


def _on_cpus(transformer: Any, context: Any) -> None:
    """Enable parallelism on CPUs. `enable_parallelism` of diffusers divides by the number of accelerators, which is 0."""
    from diffusers import ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    config: Any = ParallelConfig(context_parallel_config=context)
    mesh = context.mesh or dist.init_device_mesh(
        "cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names
    )
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    transformer._parallel_config = config
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(transformer, context, transformer._cp_plan or {})
