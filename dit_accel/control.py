"""`enable`, `load_sla`, `disable`, `summary`, `sampling_loop`: public functions that control acceleration."""

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
    """Accelerate a transformer in place. If a method is on already, its settings are replaced.

    Sampling loops of diffusers pipelines need nothing else. Declare your own loop with `sampling_loop`, unless its
    `timestep` is a view of the scheduler's `timesteps`. Outside of any loop (training, a single call), sparse attention
    runs in every scheduled layer, and region-adaptive sampling runs dense.

    Args:
        target: a transformer of Wan2.1, Wan2.2 or VACE, FLUX.1, Qwen-Image, HunyuanVideo, LTX-Video, CogVideoX, Stable
            Diffusion 3 and 3.5, Lumina-Next or Lumina-Image 2.0, a wrapper of one (DDP, PEFT, torch.compile), or a
            diffusers pipeline that has one. Region-adaptive sampling without a `ratio` accepts any transformer whose call
            has one tensor `hidden_states` and returns one tensor. Both transformers of a Wan2.2 pipeline are
            accelerated; each counts its own steps.
        ras: region-adaptive sampling: an `RASConfig`, a preset ("quality", "balanced", "fast", "forecast", "partial",
            "few-step", "paper"), a YAML file, or a dict of `RASConfig` fields. "none" switches it off. Default: unchanged.
        sla: sparse attention: an `SLAConfig`, a preset ("quality", "balanced", "fast", "few-step"),
            a YAML file, a dict of `SLAConfig` fields, or an SLA checkpoint that `save_sla` or fine-tuning wrote (the
            folder or the file). If weights of the transformer were trained with it, they replace the present weights
            until `disable` or other settings. "none" switches it off. Default: unchanged.
        **methods: further methods by name, instances of `dit_accel.runtime.method.Method`.

    Each argument may be a dict by transformer, `sla={"transformer": "balanced", "transformer_2": "fast"}`. Transformers
    that the dict does not name are unchanged.

    Raises:
        ValueError: an argument is not accepted, the transformer is not supported, or the SLA checkpoint was made for
            another model. Acceleration is unchanged then.
        RuntimeError: the weights of an SLA checkpoint cannot be taken out, see `disable`.
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
        for part, before in done:  # restore the first transformer if the second one fails
            uninstall(part)
            if before is not None:
                install(part, before.methods.values(), pipe=target)
        raise


def _settings(argument: str, value: Any) -> Any:
    """Return a config, a checkpoint or a method for an argument. "none" and dicts by transformer are returned unchanged."""
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
    """Refuse SLA checkpoints and methods that are given for two transformers, because they belong to one."""
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
    """Put methods on a transformer and take methods off.

    Args:
        part: a transformer, or the target of `enable` if it has only one.
        wanted: settings by the name of the method: a config, a checkpoint, a method, or "none".
        before: acceleration that is on now; None if it is off.
        pipe: the pipeline, if `part` is one of its two transformers; else None.
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
    transformer = transformer_of(
        target
    )  # first, because it refuses targets without a supported transformer
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
    if repr(on.config) == repr(settings):  # not ==, because 1 (one step) and 1.0 (all steps) differ
        return on
    return SparseAttention(settings, _kept_weights(settings, on))


def _kept_weights(settings: SLAConfig, on: SparseAttention) -> dict[str, dict[str, Any]] | None:
    """Return learned weights that stay under new settings: those of the same `combine`, and of a learned router.

    None if no weights stay, or if they were trained together with weights of the transformer, which are taken out.
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
    """Enable sparse attention with the settings and weights of an SLA checkpoint, which `save_sla` or fine-tuning wrote.

    Sparse attention with other settings is replaced. Region-adaptive sampling is unchanged.

    Args:
        target: a pipeline or transformer of the base model for which the SLA checkpoint was made, in any dtype.
        dir_or_id: a folder with `sla.safetensors`, the file itself, or a hub repository. Fine-tuned weights or adapters of
            the transformer are in the same folder. For a pipeline with two transformers: a folder or hub repository
            with the sub-folders `transformer` and `transformer_2`, or one of them.
        revision: branch, tag or commit of a hub repository. Default: the main branch.
        **hub: further arguments of `huggingface_hub.hf_hub_download` (`token`, `cache_dir`, ...).

    Raises:
        ValueError: the file cannot be found or read, or was made for another model. The transformer is unchanged then.
    """
    enable(target, sla=find_settings(target, dir_or_id, revision=revision, **hub))


def disable(target: Any) -> None:
    """Remove all acceleration, so that the transformer is exactly as before. Does nothing if none is on.

    Args:
        target: as in `enable`.

    Raises:
        RuntimeError: the weights of an SLA checkpoint cannot be taken out, because weights were quantised or offloaded
            one by one since. The message says what to undo. Acceleration stays on then.
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
    """Context manager that declares the scheduler of your own sampling loop, so that its steps are known.

    It is not needed if `timestep` is a view of the timesteps of an enabled pipeline's scheduler. Calls inside the block
    belong to this scheduler, unless a pipeline makes them. Nothing happens if acceleration is off.

    Args:
        target: as in `enable`.
        scheduler: a diffusers scheduler, after `set_timesteps`.
        timesteps: `[steps]`, timesteps of a loop without a diffusers scheduler. Pass views of it (`timesteps[i]`) to the
            transformer, or set `loop.step` before each call.
        sigmas: `[steps]` or longer, noise levels of these timesteps. Region-adaptive sampling needs them.

    Yields:
        The loop. Set `loop.step` to the index of the step if `timestep` is not a view.

    Raises:
        ValueError: neither or both of scheduler and timesteps are given, or a tensor has another shape.

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
        loop.frame = None  # the frame holds a reference to the loop


def summary(target: Any, *, strict: bool = False) -> Summary:
    """Return a summary of the last run: sparse and dense calls, partial and forecast steps, and reasons for dense ones.

    Args:
        target: as in `enable`.
        strict: whether to raise an error if acceleration did not work.

    Raises:
        RuntimeError: with `strict`: acceleration is off, a scheduled layer never ran sparse, or region-adaptive sampling
            had no partial or forecast step.
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
