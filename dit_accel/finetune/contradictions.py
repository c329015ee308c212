"""Check `FinetuneConfig` for options that contradict each other."""

from collections.abc import Iterator
from typing import Any

from dit_accel.finetune.checks import SECRETS, SOURCES


def check_combinations(config: Any) -> None:
    """Raise ValueError for the first pair of options that contradict each other."""
    for holds, message in _contradictions(config):
        if holds:
            raise ValueError(message)


def _contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    """Yield pairs of a condition that must not hold and the error message for it."""
    yield from _data_contradictions(c)
    yield from _objective_contradictions(c)
    yield from _parameter_contradictions(c)
    yield from _run_contradictions(c)


def _unused(c: Any, name: str, needs: str, ok: bool) -> tuple[bool, str]:
    """Return the condition and message for an option that has no effect without `needs`."""
    value = getattr(c, name)
    return value is not None and not ok, f"{name}={value!r}: requires {needs}"


def _data_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    sources = [x for x in SOURCES if getattr(c, x) is not None]
    yield (
        len(sources) > 1,
        f"{', '.join(f'{x}={getattr(c, x)!r}' for x in sources)}: expected exactly one source of data",
    )
    for name in ("num_teacher_samples", "teacher_num_inference_steps", "teacher_guidance_scale"):
        yield _unused(c, name, "prompts", c.prompts is not None)
    yield (
        (c.height is None) != (c.width is None),
        f"height={c.height!r}, width={c.width!r}: set both or neither",
    )
    for name in ("height", "width", "num_frames"):
        yield _unused(c, name, "buckets=None, because buckets set all sizes", c.buckets is None)
    for name in ("height", "width", "num_frames", "buckets"):
        needs = "precomputed_dir=None, because precomputed data has fixed sizes"
        yield _unused(c, name, needs, c.precomputed_dir is None)
    shown = c.instance_data_dir is not None or c.validation_prompts is not None
    yield _unused(c, "fps", "instance_data_dir or validation_prompts", shown or not sources)


def _objective_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    trains = "distillation" in c.stages
    yield (
        c.targets == "guided" and c.loss == "diffusion",
        "targets='guided': requires loss='distillation', because loss='diffusion' has no teacher to guide",
    )
    yield (
        c.targets == "guided" and c.loss == "mix",
        "targets='guided': requires loss='distillation', because the guided velocity contradicts the data term of "
        "loss='mix'",
    )
    yield (
        c.targets == "guided" and c.guidance_scale is None,
        "guidance_scale=None: targets='guided' requires a number above 1",
    )
    yield _unused(c, "guidance_scale", "targets='guided'", c.targets == "guided")
    yield _unused(c, "diffusion_weight", "loss='mix'", c.loss == "mix")
    yield _unused(c, "caption_dropout", "targets='mixed'", c.targets == "mixed")
    yield (
        "regression" in c.stages and not c.has_sla_weights,
        f"stages={c.stages!r}: the regression stage has nothing to train, because sla.combine="
        f"{c.sla['combine']!r} with router='fixed' has no weights; use stages=('distillation',), sla.combine='proj' "
        "or 'alpha', or router='learned'",
    )
    yield (
        bool(c.regression_topk) and "regression" not in c.stages,
        f"regression_topk={c.regression_topk!r}: requires the regression stage in stages",
    )
    for name in ("topk_start", "anneal_steps"):
        yield _unused(c, name, "the distillation stage in stages", trains)


def _parameter_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    yield (
        c.train == "sla" and not c.has_sla_weights,
        f"train='sla': nothing would train, because sla.combine={c.sla['combine']!r} with router='fixed' has no "
        "weights; use sla.combine='proj' or 'alpha', or router='learned'",
    )
    for name in ("lora_alpha", "lora_layers"):
        yield _unused(c, name, "train='lora'", c.train == "lora")
    needs = "sla.combine='proj' or 'alpha', or router='learned'"
    yield _unused(c, "sla_learning_rate", needs, c.has_sla_weights)
    start, steps, topk = c.topk_start, c.anneal_steps, c.sla["topk"]
    yield (
        (start is None) != (steps is None),
        f"topk_start={start!r}, anneal_steps={steps!r}: set both or neither",
    )
    if start is not None and steps is not None:
        yield (
            topk is None or start <= topk,
            f"topk_start={start}: must be above sla.topk={topk}",
        )
        yield (
            steps > c.max_train_steps,
            f"anneal_steps={steps}: must be at most max_train_steps={c.max_train_steps}",
        )
    yield (
        c.merge and c.train == "sla",
        "merge=True: requires train='all' or 'lora', because train='sla' changes no weights of the model",
    )


def _run_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    warmup = c.lr_warmup_steps
    yield (
        warmup > 0 and c.lr_scheduler == "constant",
        f"lr_warmup_steps={warmup}: lr_scheduler='constant' has no warm-up; use 'constant_with_warmup'",
    )
    yield (
        warmup > c.max_train_steps,
        f"lr_warmup_steps={warmup}: must be at most max_train_steps={c.max_train_steps}",
    )
    yield (
        c.use_8bit_adam and c.optimizer != "adamw",
        f"use_8bit_adam=True: requires optimizer='adamw', not {c.optimizer!r}",
    )
    yield (
        c.fsdp and c.train != "all",
        f"fsdp=True: requires train='all'; with train={c.train!r} the weights of the model are frozen and cannot be sharded",
    )
    yield (
        c.fsdp and c.use_8bit_adam,
        "fsdp=True, use_8bit_adam=True: cannot be combined, because bitsandbytes cannot read sharded weights",
    )
    yield (
        c.fsdp and c.mixed_precision == "fp16",
        "fsdp=True, mixed_precision='fp16': cannot be combined; use mixed_precision='bf16' or 'no'",
    )
    prompts = c.validation_prompts is not None
    for name in (
        "validation_steps",
        "validation_num_inference_steps",
        "validation_guidance_scale",
    ):
        yield _unused(c, name, "validation_prompts", prompts)
    yield (
        c.push_to_hub and c.report_to == "wandb" and c.hub_token is not None,
        "hub_token, report_to='wandb': the tracker would store the token; use `hf auth login` instead of hub_token",
    )
    for name in ("hub_model_id", "hub_token"):
        given = getattr(c, name) is not None
        shown = "..." if name in SECRETS else repr(getattr(c, name))
        yield given and not c.push_to_hub, f"{name}={shown}: requires push_to_hub=True"
