"""`enable`, `load_sla`, `disable`, `summary`, `sampling_loop`: the public functions of acceleration."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint, read_checkpoint, settings_of
from dit_accel.checkpoint.identity import identity_of, weights_of
from dit_accel.checkpoint.save_load import find_checkpoint
from dit_accel.config import OFF, RASConfig, SLAConfig
from dit_accel.models import check_pipeline
from dit_accel.ras import RegionAdaptiveSampling
from dit_accel.runtime.caller import declaring_frame
from dit_accel.runtime.install import (
    install,
    installation_of,
    parts_of,
    transformer_of,
    uninstall,
)
from dit_accel.runtime.loop import SamplingLoop
from dit_accel.runtime.method import Method
from dit_accel.runtime.summary import summarise
from dit_accel.sla import SparseAttention
from dit_accel.summaries import Summary


def enable(
    target: Any,
    *,
    ras: RASConfig | dict | str | os.PathLike | None = None,
    sla: SLAConfig | SLACheckpoint | dict | str | os.PathLike | None = None,
    **methods: Any,
) -> None:
    """Accelerate a transformer in place. Settings of a method that is on already are replaced.

    In a sampling loop of diffusers nothing else is needed, whichever pipeline runs it. A loop written by hand
    is followed through its scheduler's `timesteps`, or declared with `sampling_loop`. Outside of any loop
    (training, a single call) sparse attention runs in every scheduled layer, and region-adaptive sampling
    runs dense.

    Args:
        target: a transformer of Wan2.1, Stable Diffusion 3 and 3.5, Lumina-Next or Lumina-Image 2.0, a wrapper
            of one (DDP, PEFT, torch.compile), or a diffusers pipeline that has one. Region-adaptive sampling without
            a `ratio` takes any transformer whose call has one tensor `hidden_states` and returns one tensor.
        ras: region-adaptive sampling: an `RASConfig`, a preset ("quality", "balanced", "fast", "forecast", "partial",
            "few-step", "paper"), a YAML file, or a dict of `RASConfig` fields. "none" switches it off. Default: left as it is.
        sla: sparse attention: an `SLAConfig`, a preset ("quality", "balanced", "fast", "few-step"),
            a YAML file, a dict of `SLAConfig` fields, or an SLA checkpoint that `save_sla` or fine-tuning wrote (the
            folder or the file). Weights of the transformer that were trained with it are put in, and `disable` or
            other settings put the former ones back. "none" switches it off. Default: left as it is.
        **methods: further methods, each an instance of `dit_accel.runtime.method.Method` under its name.

    Raises:
        ValueError: a bad argument, a transformer that is not supported, or an SLA checkpoint made for another
            model. What was on before is then still on.
        RuntimeError: weights that an SLA checkpoint brought cannot be put back, see `disable`.
    """
    if ras is None and sla is None and not methods:
        raise ValueError(
            "ras=None, sla=None: nothing to enable; accepted are a preset name, a config, a YAML file, a dict, or "
            "the folder of an SLA checkpoint"
        )
    further = dict(_further(methods))
    config = None if ras is None else RASConfig.load(ras)
    settings = None if sla is None or sla == OFF else settings_of(sla)
    parts = parts_of(target)
    if len(parts) > 1 and (
        further or settings is not None or (config and config.has_partial_steps)
    ):
        check_pipeline(target)
    done: list[tuple[Any, Any]] = []
    for part in parts.values():
        made: dict[str, Any] = dict(further)
        if ras is not None:
            made["ras"] = None if config is None else RegionAdaptiveSampling(config)
        before = installation_of(part)
        on: dict[str, Any] = {} if before is None else dict(before.methods)
        if sla is not None:
            made["sla"] = None
            if settings is not None:
                made["sla"] = _sparse_attention(part, settings, on.get("sla"))
        chosen = {name: x for name, x in {**on, **made}.items() if x is not None}
        if chosen:
            pipe = None if part is target else target
            try:
                install(part, chosen.values(), replaced=before, pipe=pipe)
            except BaseException:
                for other, earlier in done:  # the first transformer of two goes back to what it had
                    uninstall(other)
                    if earlier is not None:
                        install(other, earlier.methods.values(), pipe=pipe)
                raise
        else:
            uninstall(part)
        done.append((part, before))


def _further(methods: dict[str, Any]) -> Iterator[tuple[str, Method]]:
    for name, method in methods.items():
        if not isinstance(method, Method) or method.name != name:
            raise ValueError(
                f"{name}={method!r}: accepted are ras, sla, and methods (instances of Method) under their name"
            )
        yield name, method


def _sparse_attention(
    target: Any, settings: SLAConfig | SLACheckpoint, on: SparseAttention | None
) -> SparseAttention:
    transformer = transformer_of(target)  # refuses what has none before anything is compared
    if isinstance(settings, SLACheckpoint):
        swap = None if settings.companion is None else settings.companion.swap()
        if swap is not None:
            swap.check(transformer)
        try:
            settings.base.check(identity_of(transformer, original=True))
        except ValueError as error:
            raise ValueError(f"sla: this SLA checkpoint was {error}") from None
        return SparseAttention(settings.config, settings.layer_weights(), swap=swap)
    if on is None:
        return SparseAttention(settings)
    if repr(on.config) == repr(settings):  # equality takes one step, 1, for all of them, 1.0
        return on
    return SparseAttention(settings, _kept_weights(settings, on))


def _kept_weights(settings: SLAConfig, on: SparseAttention) -> dict[str, dict[str, Any]] | None:
    """Return what was learned under other settings and stays: weights of the same combine, and of a learned router.

    None of it stays where it was learned together with weights of the transformer, which leave.
    """
    if on.swap is not None:
        return None
    branch = on.config.combine == settings.combine and settings.has_linear_branch
    branch = branch and all(x.calibrated for x in on.attention.values())
    router = on.config.router == settings.router == "learned"
    if not branch and not router:
        return None
    return {
        layer: {
            name: x
            for name, x in weights_of(module).items()
            if (router if name.startswith("learned_router.") else branch)
        }
        for layer, module in on.attention.items()
    }


def load_sla(
    target: Any, dir_or_id: str | os.PathLike, *, revision: str | None = None, **hub: Any
) -> None:
    """Switch sparse attention on with the settings and weights that `save_sla` or fine-tuning wrote.

    Sparse attention with other settings is replaced. Region-adaptive sampling stays as it is.

    Args:
        target: a pipeline or transformer of the base model that the SLA checkpoint was made for, in any dtype.
        dir_or_id: a folder that holds `sla.safetensors`, the file, or a hub repository. Fine-tuned weights or
            adapters of the transformer are beside that file.
        revision: branch, tag or commit of a hub repository. Default: the main branch.
        **hub: further arguments of `huggingface_hub.hf_hub_download` (`token`, `cache_dir`, ...).

    Raises:
        ValueError: the file cannot be found or read, or was made for another model. The transformer is
            then unchanged.
    """
    path = find_checkpoint(dir_or_id, revision=revision, **hub)
    enable(target, sla=read_checkpoint(path))


def disable(target: Any) -> None:
    """Take all acceleration off; the transformer is then exactly what it was. No-op if none is on.

    Args:
        target: as in `enable`.

    Raises:
        RuntimeError: weights that an SLA checkpoint brought cannot be put back, because weights were quantised or
            offloaded one by one since; the message says what to undo. Acceleration then stays on.
    """
    uninstall(target)


@contextlib.contextmanager
def sampling_loop(
    target: Any,
    scheduler: Any = None,
    *,
    timesteps: Any = None,
    sigmas: Any = None,
) -> Iterator[SamplingLoop]:
    """Declare the scheduler of a sampling loop written by hand, so that steps are known.

    Without it a loop is followed where `timestep` is a view of the timesteps of an enabled pipeline's
    scheduler. Calls that are made from inside the block belong to this scheduler, unless a pipeline
    makes them. Nothing happens where acceleration is off.

    Args:
        target: as in `enable`.
        scheduler: a diffusers scheduler that was told its steps (`set_timesteps`).
        timesteps: `[steps]`, of a loop without a diffusers scheduler. Pass views of it (`timesteps[i]`) to the
            transformer, or set `loop.step` before its calls.
        sigmas: `[steps]` or longer, the noise levels of these timesteps. Region-adaptive sampling needs them.

    Yields:
        The loop; `loop.step` tells the index of the step where `timestep` cannot.

    Raises:
        ValueError: neither or both of scheduler and timesteps, or tensors of another shape.

    Example:
        >>> dit_accel.enable(transformer, ras="balanced")
        >>> scheduler.set_timesteps(20)
        >>> with torch.no_grad(), dit_accel.sampling_loop(transformer, scheduler):
        ...     for t in scheduler.timesteps:
        ...         velocity = transformer(latents, t.expand(1), text, return_dict=False)[0]
        ...         latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    """
    loop = SamplingLoop(scheduler, timesteps=timesteps, sigmas=sigmas)
    transformer_of(target, any_model=True)
    installation = installation_of(target)
    if installation is None:
        yield loop
        return
    loop.frame = declaring_frame()
    try:
        with installation.clock.declare(loop):
            yield loop
    finally:
        loop.frame = None  # it holds the loop


def summary(target: Any, *, strict: bool = False) -> Summary:
    """Return what each method did in the last run: sparse and dense calls, steps on some tokens, reasons.

    Args:
        target: as in `enable`.
        strict: raise RuntimeError if any method that is on accelerated nothing: a layer that the schedule lets
            run sparse never did, or no step ran on some of the tokens only.
    """
    result = Summary(summarise(target).methods)
    if not strict:
        return result
    if not result.enabled:
        raise RuntimeError("acceleration is off: call enable() first")
    never = [x for x in result.layers if x.scheduled and not x.sparse_calls]
    if never:
        raise RuntimeError(
            "sla: never sparse although scheduled (crossover='never' runs it sparse at every length, sla='none' "
            "switches it off): "
            + "; ".join(f"{x.name} ({', '.join(x.dense_calls) or 'not called'})" for x in never)
        )
    if result.ras is not None and not result.ras.ras_steps:
        why = ", ".join(result.ras.dense_calls) or "not called"
        raise RuntimeError(f"ras: region-adaptive sampling never left a token out ({why})")
    return result
