"""`enable`, `load_sla`, `disable`, `summary`, `sampling_loop`: the public functions of acceleration."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint, settings_of
from dit_accel.checkpoint.identity import identity_of, weights_of
from dit_accel.checkpoint.save_load import find_settings
from dit_accel.config import OFF, RASConfig, SLAConfig
from dit_accel.ras import RegionAdaptiveSampling
from dit_accel.runtime.caller import declaring_frame
from dit_accel.runtime.components import is_by_component, parts_of, split
from dit_accel.runtime.install import (
    install,
    installation_of,
    installations_of,
    uninstall,
)
from dit_accel.runtime.loop import SamplingLoop
from dit_accel.runtime.method import Method
from dit_accel.runtime.target import transformer_of
from dit_accel.sla import SparseAttention
from dit_accel.summaries import Summary, summary_of


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
        target: a transformer of Wan2.1, Wan2.2 or VACE, FLUX.1, Qwen-Image, HunyuanVideo, LTX-Video, CogVideoX, Stable
            Diffusion 3 and 3.5, Lumina-Next or Lumina-Image 2.0, a wrapper of one (DDP, PEFT, torch.compile), or a
            diffusers pipeline that has one. Region-adaptive sampling without
            a `ratio` takes any transformer whose call has one tensor `hidden_states` and returns one tensor. Both
            transformers of a Wan2.2 pipeline are accelerated; each counts the steps that it runs.
        ras: region-adaptive sampling: an `RASConfig`, a preset ("quality", "balanced", "fast", "forecast", "partial",
            "few-step", "paper"), a YAML file, or a dict of `RASConfig` fields. "none" switches it off. Default: left as it is.
        sla: sparse attention: an `SLAConfig`, a preset ("quality", "balanced", "fast", "few-step"),
            a YAML file, a dict of `SLAConfig` fields, or an SLA checkpoint that `save_sla` or fine-tuning wrote (the
            folder or the file). Weights of the transformer that were trained with it are put in, and `disable` or
            other settings put the former ones back. "none" switches it off. Default: left as it is.
        **methods: further methods, each an instance of `dit_accel.runtime.method.Method` under its name.

    Each argument may be a dict by transformer, `sla={"transformer": "balanced", "transformer_2": "fast"}`; a transformer
    that it does not name is left as it is.

    Raises:
        ValueError: a bad argument, a transformer that is not supported, or an SLA checkpoint made for another
            model. What was on before is then still on.
        RuntimeError: weights that an SLA checkpoint brought cannot be put back, see `disable`.
    """
    parts = parts_of(target)
    wanted: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for argument, value in {"ras": ras, "sla": _settings("sla", sla), **methods}.items():
        for name, x in split(argument, value, parts).items():
            if x is not None:
                wanted[name][argument] = _settings(argument, x)
    if not any(wanted.values()):
        raise ValueError(
            "ras=None, sla=None: nothing to enable; accepted are a preset name, a config, a YAML file, a dict, or "
            "the folder of an SLA checkpoint"
        )
    _check_shared(wanted)
    done: list[tuple[Any, Any]] = []
    try:
        for name, part in parts.items():
            if wanted[name]:
                before = installation_of(part)
                _change(part, wanted[name], before, None if part is target else target)
                done.append((part, before))
    except BaseException:
        for part, before in done:  # the first transformer of two goes back to what it had
            uninstall(part)
            if before is not None:
                install(part, before.methods.values(), pipe=target)
        raise


def _settings(argument: str, value: Any) -> Any:
    """Return the settings in an argument: a config, a checkpoint, a method, "none" for off, or a dict of them by transformer."""
    if value is None or value == OFF or is_by_component(value):
        return value
    if argument == "ras":
        return RASConfig.load(value)
    if argument == "sla":
        return settings_of(value)
    if not isinstance(value, Method) or value.name != argument:
        raise ValueError(
            f"{argument}={value!r}: accepted are ras, sla, and methods (instances of Method) under their name"
        )
    return value


def _check_shared(wanted: dict[str, dict[str, Any]]) -> None:
    """Refuse what belongs to one transformer and was given for two."""
    given = [x for one in wanted.values() for x in one.items()]
    for i, (argument, value) in enumerate(given):
        if any(value is other for _, other in given[:i]):
            if isinstance(value, SLACheckpoint):
                raise ValueError(
                    "sla: one SLA checkpoint for a pipeline with two transformers; accepted is a dict by transformer, or a "
                    f"folder with sub-folders {' and '.join(wanted)}"
                )
            if isinstance(value, Method):
                raise ValueError(
                    f"{argument}={value!r}: one method for a pipeline with two transformers; accepted is a dict by transformer"
                )


def _change(part: Any, wanted: dict[str, Any], before: Any, pipe: Any) -> None:
    """Put methods on a transformer, and take those off that are to be off.

    Args:
        part: a transformer, or the target of `enable` that has only one.
        wanted: methods, their settings, or "none", by name.
        before: acceleration that is on now.
        pipe: the pipeline, if `part` is one of its two transformers.
    """
    on: dict[str, Any] = {} if before is None else dict(before.methods)
    chosen = {name: x for name, x in on.items() if name not in wanted}
    for name, x in wanted.items():
        if x == OFF:
            continue
        if name == "ras":
            chosen[name] = RegionAdaptiveSampling(x)
        elif name == "sla":
            chosen[name] = _sparse_attention(part, x, on.get(name))
        else:
            chosen[name] = x
    if chosen:
        install(part, chosen.values(), replaced=before, pipe=pipe)
    else:
        uninstall(part)


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
            adapters of the transformer are beside that file. For a pipeline with two transformers: a folder or hub
            repository with the sub-folders `transformer` and `transformer_2`, or one of them.
        revision: branch, tag or commit of a hub repository. Default: the main branch.
        **hub: further arguments of `huggingface_hub.hf_hub_download` (`token`, `cache_dir`, ...).

    Raises:
        ValueError: the file cannot be found or read, or was made for another model. The transformer is
            then unchanged.
    """
    enable(target, sla=find_settings(target, dir_or_id, revision=revision, **hub))


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
    installations = installations_of(target)
    if not installations:
        yield loop
        return
    loop.frame = declaring_frame()
    try:
        with contextlib.ExitStack() as declared:
            for installation in installations.values():
                declared.enter_context(installation.clock.declare(loop))
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
    result = summary_of(target)
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
    for name, part in (result.parts or {"": result}).items():
        if part.ras is not None and not part.ras.ras_steps:
            why = ", ".join(part.ras.dense_calls) or "not called"
            where = f" in {name}" if name else ""
            raise RuntimeError(
                f"ras: region-adaptive sampling never left a token out{where} ({why})"
            )
    return result
