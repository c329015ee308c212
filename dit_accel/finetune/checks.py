"""Check each field of `FinetuneConfig` on its own."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from dit_accel.config.base import check, check_choice, is_int, is_number
from dit_accel.finetune.families import FAMILIES
from dit_accel.sampling.settings import LARGEST, check_count, check_fps, check_seed

SECRETS = ("hub_token",)
"""Fields that must never be written to a file."""
SOURCES = ("instance_data_dir", "precomputed_dir", "prompts")
"""Options that name a source of data. A run uses exactly one."""
CHOICES = {
    "router": ("fixed", "learned"),
    "loss": ("distillation", "diffusion", "mix"),
    "targets": ("conditional", "mixed", "guided"),
    "weighting_scheme": ("none", "uniform", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
    "train": ("all", "lora", "sla"),
    "lr_scheduler": (
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ),
    "optimizer": ("adamw", "prodigy"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "report_to": ("tensorboard", "wandb", "none"),
}
COUNTS = (
    "height",
    "width",
    "num_frames",
    "max_sequence_length",
    "num_teacher_samples",
    "teacher_num_inference_steps",
    "regression_steps",
    "rank",
    "lora_alpha",
    "anneal_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "num_validation_videos",
    "validation_num_inference_steps",
)
"""Fields that hold an int >= 1."""
COUNTS_OR_ZERO = ("lr_warmup_steps", "max_nonfinite")
FLAGS = (
    "use_8bit_adam",
    "gradient_checkpointing",
    "use_ema",
    "allow_tf32",
    "fsdp",
    "merge",
    "push_to_hub",
)
TEXTS = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "cache_dir",
    "output_dir",
    *SOURCES,
    "caption_column",
    "video_column",
    "lora_layers",
    "device",
    "resume_from_checkpoint",
    "validation_prompts",
    "tracker_name",
    "logging_dir",
    "hub_model_id",
    "hub_token",
)
Rule = tuple[Callable[[float], bool], str]
ANY: Rule = (lambda x: True, "a finite number")
POSITIVE: Rule = (lambda x: x > 0, "a number above 0")
AT_LEAST_0: Rule = (lambda x: x >= 0, "a number >= 0")
BELOW_1: Rule = (lambda x: 0 <= x < 1, "a number in [0, 1)")
SHARE: Rule = (lambda x: 0 < x < 1, "a number in (0, 1)")
FRACTION: Rule = (lambda x: 0 < x <= 1, "a fraction in (0, 1]")
NUMBERS = {
    "teacher_guidance_scale": AT_LEAST_0,
    "guidance_scale": (lambda x: x > 1, "a number above 1"),
    "validation_guidance_scale": AT_LEAST_0,
    "diffusion_weight": SHARE,
    "caption_dropout": SHARE,
    "logit_mean": ANY,
    "logit_std": POSITIVE,
    "mode_scale": AT_LEAST_0,
    "flow_shift": POSITIVE,
    "topk_start": FRACTION,
    "regression_learning_rate": POSITIVE,
    "learning_rate": POSITIVE,
    "sla_learning_rate": POSITIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_weight_decay": AT_LEAST_0,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": AT_LEAST_0,
    "ema_decay": SHARE,
    "checkpointing_minutes": POSITIVE,
}


def check_fields(config: Any) -> None:
    """Raise ValueError for the first field with an invalid value."""
    optional = _optional(config)

    def given(names: Any) -> Iterator[tuple[str, Any]]:
        """Yield names and values. Skip optional fields that are None."""
        for name in names:
            value = getattr(config, name)
            if value is not None or name not in optional:
                yield name, value

    families = tuple(FAMILIES.values())
    check("family", config.family, config.family in (None, *families), ", ".join(families))
    for name, value in given(CHOICES):
        check_choice(name, value, CHOICES[name])
    for name, value in given(COUNTS):
        check_count(name, value, largest=LARGEST.get(name))
    for name, value in given(COUNTS_OR_ZERO):
        check(name, value, is_int(value) and value >= 0, "an int >= 0")
    for name, value in given(FLAGS):
        check(name, value, isinstance(value, bool), "true or false")
    for name, value in given(TEXTS):
        shown = "..." if name in SECRETS else value
        check(name, shown, isinstance(value, str) and bool(value.strip()), "text that is not empty")
    for name, value in given(NUMBERS):
        holds, accepted = NUMBERS[name]
        number = is_number(value) and math.isfinite(value)
        check(name, value, number and holds(value), accepted)
    if config.fps is not None:
        check_fps(config.fps)
    check_seed(config.seed)
    check("sla", config.sla, isinstance(config.sla, dict), "fields of SLAConfig")
    _check_lists(config)


def _optional(config: Any) -> set[str]:
    """Return the names of the fields that accept None: the fields whose default is None."""
    return {name for name, x in type(config).__dataclass_fields__.items() if x.default is None}


def _check_lists(config: Any) -> None:
    stages, known = config.stages, ("regression", "distillation")
    check(
        "stages",
        stages,
        isinstance(stages, tuple) and stages in (known, known[:1], known[1:]),
        "regression, distillation, or both in this order",
    )
    topk = config.regression_topk
    check(
        "regression_topk",
        topk,
        isinstance(topk, tuple) and all(is_number(x) and 0 < x <= 1 for x in topk),
        "a list of fractions in (0, 1]",
    )
    if config.buckets is not None:
        bucket_sizes(config.buckets)


def bucket_sizes(text: Any, argument: str = "buckets") -> list[tuple[int, int, int]]:
    """Parse buckets of the form "F,H,W;F,H,W" into (frames, height, width).

    The function does not check whether a model supports the sizes.

    Args:
        text: value of the option.
        argument: name of the option, for messages.

    Raises:
        ValueError: if the text has another form or names a bucket twice.
    """
    largest = LARGEST["height"]
    expected = (
        f"frames,height,width in [1, {largest}], separated by ';', such as '33,64,64;17,64,96'"
    )
    if not isinstance(text, str):
        raise ValueError(f"{argument}={text!r}: expected {expected}")
    buckets: list[tuple[int, int, int]] = []
    for part in text.split(";"):
        numbers = [x.strip() for x in part.split(",")]
        ok = len(numbers) == 3 and all(x.isascii() and x.isdecimal() for x in numbers)
        frames, height, width = map(int, numbers) if ok else (0, 0, 0)
        if not all(1 <= x <= largest for x in (frames, height, width)):
            raise ValueError(
                f"{argument}={text!r}: {part.strip()!r} is not a bucket; expected {expected}"
            )
        if (frames, height, width) in buckets:
            raise ValueError(
                f"{argument}={text!r}: {frames}x{height}x{width} is given twice; each bucket must be unique"
            )
        buckets.append((frames, height, width))
    return buckets
