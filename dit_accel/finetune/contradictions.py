"""Options of `FinetuneConfig` that contradict each other."""

from collections.abc import Iterator
from typing import Any

from dit_accel.finetune.checks import SECRETS, SOURCES


def check_combinations(config: Any) -> None:
    """Raise ValueError for the first pair of options that contradict each other."""
    for holds, message in _contradictions(config):
        if holds:
            raise ValueError(message)


def _contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    """Yield conditions that must not hold, each with its message."""
    yield from _data_contradictions(c)
    yield from _objective_contradictions(c)
    yield from _parameter_contradictions(c)
    yield from _run_contradictions(c)


def _unused(c: Any, name: str, needs: str, ok: bool) -> tuple[bool, str]:
    """A value of an option that has no effect without another one."""
    value = getattr(c, name)
    return value is not None and not ok, f"{name}={value!r}: accepted with {needs}"


def _data_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    sources = [x for x in SOURCES if getattr(c, x) is not None]
    yield (
        len(sources) > 1,
        f"{', '.join(f'{x}={getattr(c, x)!r}' for x in sources)}: accepted is one source of data",
    )
    for name in ("num_teacher_samples", "teacher_num_inference_steps", "teacher_guidance_scale"):
        yield _unused(c, name, "prompts", c.prompts is not None)
    yield (
        (c.height is None) != (c.width is None),
        f"height={c.height!r}, width={c.width!r}: accepted are both or neither",
    )
    for name in ("height", "width", "num_frames"):
        yield _unused(c, name, "buckets=None; buckets give all sizes", c.buckets is None)
    for name in ("height", "width", "num_frames", "buckets"):
        needs = "precomputed_dir=None; precomputed data has its own sizes"
        yield _unused(c, name, needs, c.precomputed_dir is None)
    shown = c.instance_data_dir is not None or c.validation_prompts is not None
    yield _unused(c, "fps", "instance_data_dir or validation_prompts", shown or not sources)


def _objective_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    trains = "distillation" in c.stages
    yield (
        c.targets == "guided" and c.loss == "diffusion",
        "targets='guided': the targets of loss='diffusion' are data, which nothing guides; accepted with "
        "loss='distillation'",
    )
    yield (
        c.targets == "guided" and c.loss == "mix",
        "targets='guided': its velocity is another one than that of the data in loss='mix'; accepted with "
        "loss='distillation'",
    )
    yield (
        c.targets == "guided" and c.guidance_scale is None,
        "guidance_scale=None: targets='guided' needs one; accepted is a number above 1",
    )
    yield _unused(c, "guidance_scale", "targets='guided'", c.targets == "guided")
    yield _unused(c, "diffusion_weight", "loss='mix'", c.loss == "mix")
    yield _unused(c, "caption_dropout", "targets='mixed'", c.targets == "mixed")
    yield (
        "regression" in c.stages and not c.has_sla_weights,
        f"stages={c.stages!r}: regression fits the weights of sparse attention, and sla.combine="
        f"{c.sla['combine']!r} with router='fixed' has none; accepted is stages=('distillation',), sla.combine='proj' "
        "or 'alpha', or router='learned'",
    )
    yield (
        bool(c.regression_topk) and "regression" not in c.stages,
        f"regression_topk={c.regression_topk!r}: accepted with the stage regression",
    )
    for name in ("topk_start", "anneal_steps"):
        yield _unused(c, name, "the stage distillation", trains)


def _parameter_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    yield (
        c.train == "sla" and not c.has_sla_weights,
        f"train='sla': nothing would train, because sla.combine={c.sla['combine']!r} with router='fixed' has no "
        "weights; accepted is sla.combine='proj' or 'alpha', or router='learned'",
    )
    for name in ("lora_alpha", "lora_layers"):
        yield _unused(c, name, "train='lora'", c.train == "lora")
    yield _unused(c, "sla_learning_rate", "weights of sparse attention", c.has_sla_weights)
    start, steps, topk = c.topk_start, c.anneal_steps, c.sla["topk"]
    yield (
        (start is None) != (steps is None),
        f"topk_start={start!r}, anneal_steps={steps!r}: accepted together",
    )
    if start is not None and steps is not None:
        yield (
            topk is None or start <= topk,
            f"topk_start={start}: accepted is a fraction above sla.topk={topk}",
        )
        yield (
            steps > c.max_train_steps,
            f"anneal_steps={steps}: accepted are at most max_train_steps={c.max_train_steps}",
        )
    yield (
        c.merge and c.train == "sla",
        "merge=True: train='sla' changes no weights of the model; accepted with train='all' or 'lora'",
    )


def _run_contradictions(c: Any) -> Iterator[tuple[bool, str]]:
    warmup = c.lr_warmup_steps
    yield (
        warmup > 0 and c.lr_scheduler == "constant",
        f"lr_warmup_steps={warmup}: lr_scheduler='constant' has no warm-up; accepted with 'constant_with_warmup'",
    )
    yield (
        warmup > c.max_train_steps,
        f"lr_warmup_steps={warmup}: accepted are at most max_train_steps={c.max_train_steps}",
    )
    yield (
        c.use_8bit_adam and c.optimizer != "adamw",
        f"use_8bit_adam=True: accepted with optimizer='adamw', not {c.optimizer!r}",
    )
    yield (
        c.fsdp and c.train != "all",
        f"fsdp=True: train={c.train!r} freezes the weights of the model, and sharding is for weights that train; accepted "
        "with train='all'",
    )
    yield (
        c.fsdp and c.use_8bit_adam,
        "fsdp=True, use_8bit_adam=True: bitsandbytes cannot read sharded weights; accepted is one of them",
    )
    yield (
        c.fsdp and c.mixed_precision == "fp16",
        "fsdp=True, mixed_precision='fp16': accepted is mixed_precision='bf16' or 'no'",
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
        "hub_token, report_to='wandb': the tracker would store the token; accepted is `hf auth login` instead of hub_token",
    )
    for name in ("hub_model_id", "hub_token"):
        given = getattr(c, name) is not None
        shown = "..." if name in SECRETS else repr(getattr(c, name))
        yield given and not c.push_to_hub, f"{name}={shown}: accepted with push_to_hub=True"
