"""Choose the checkpoint from which a run resumes, and check that the settings of the run match it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.finetune.checkpoints import Checkpoint, checkpoints, find_latest, read_checkpoint

LATEST = "latest"
FREE = frozenset(
    {
        "cache_dir", "checkpointing_minutes", "checkpointing_steps", "checkpoints_total_limit",
        "device", "fsdp", "gradient_accumulation_steps", "gradient_checkpointing", "hub_model_id",
        "hub_token", "instance_data_dir", "logging_dir", "max_nonfinite", "max_train_steps", "merge",
        "num_validation_videos", "output_dir", "precomputed_dir", "prompts", "push_to_hub", "report_to", "resume_from_checkpoint", "tracker_name",
        "train_batch_size", "validation_guidance_scale", "validation_num_inference_steps", "validation_prompts",
        "validation_steps",
    }
)  # fmt: skip
"""Settings that may change when a run resumes, because the weights do not depend on them. Batch size, accumulation and
number of processes may change if their product stays the same. `max_train_steps` may change with a constant schedule."""
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
"""Schedules that do not depend on `max_train_steps`."""


def choose_checkpoint(output_dir: Path, resume_from: str | None) -> Checkpoint | None:
    """Return the checkpoint from which the run resumes, or None for a new run.

    Invalid checkpoints that are skipped are reported on stderr.

    Args:
        output_dir: folder of the run. It need not exist yet.
        resume_from: None for a new run, "latest", or the folder of a checkpoint. "latest" starts a new run if the
            folder holds no checkpoint.

    Raises:
        ValueError: if a new run would use a folder with checkpoints, if the checkpoint is damaged or missing, or if
            the folder holds newer checkpoints than the named one.
    """
    present = checkpoints(output_dir) if output_dir.is_dir() else []
    if resume_from is None:
        if present:
            raise ValueError(
                f"output_dir={str(output_dir)!r}: holds {present[-1][1].name} of an earlier run; use another folder, or "
                "resume_from_checkpoint='latest' to continue that run"
            )
        return None
    if resume_from == LATEST:
        found, skipped = find_latest(output_dir, note=lambda line: sys.stderr.write(f"{line}\n"))
        if found is None and skipped:
            raise ValueError(
                f"resume_from_checkpoint='latest': no checkpoint in {str(output_dir)!r} is valid ({'; '.join(skipped)}); "
                "expected a folder with a valid checkpoint, or without checkpoints"
            )
        return found
    path = Path(resume_from)
    argument = f"resume_from_checkpoint={resume_from!r}"
    if not path.is_dir():
        raise ValueError(
            f"{argument}: no such folder; expected 'latest' or the folder of a checkpoint"
        )
    try:
        chosen = read_checkpoint(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{argument}: {error}; expected a valid checkpoint") from None
    newer = [x.name for step, x in present if step > chosen.step]
    if newer:
        raise ValueError(
            f"{argument}: {str(output_dir)!r} holds newer checkpoints ({', '.join(newer)}), which 'latest' would use next "
            "time; move them away, or use another output_dir"
        )
    return chosen


def check_settings(checkpoint: Checkpoint, config: dict[str, Any], processes: int) -> None:
    """Check that the settings of this run match those of a checkpoint.

    Args:
        checkpoint: checkpoint from which the run resumes.
        config: resolved settings of this run, as plain values.
        processes: number of processes of this run.

    Raises:
        ValueError: if a setting that affects the result differs. The message names it and both values.
    """
    before: dict[str, Any] = checkpoint.state["config"]
    where = f"resume_from_checkpoint: {checkpoint.path.name} was trained with"
    for name in sorted(before.keys() | config.keys()):
        old, new = before.get(name), config.get(name)
        if name not in FREE and old != new:
            old, new = _shortest_difference(old, new)
            raise ValueError(
                f"{name}={new!r}: {where} {name}={old!r}; use that value, or another output_dir for a new run"
            )
    old, new = before.get("max_train_steps"), config.get("max_train_steps")
    schedule = config.get("lr_scheduler", "constant")
    if old != new and schedule not in CONSTANT_SCHEDULES:
        raise ValueError(
            f"max_train_steps={new!r}: {where} {old!r}, and lr_scheduler={schedule!r} depends on it; use that value "
            f"(only {' and '.join(map(repr, CONSTANT_SCHEDULES))} allow another one)"
        )
    if new is not None and new < checkpoint.step:
        raise ValueError(
            f"max_train_steps={new}: must be at least {checkpoint.step}, the number of steps of {checkpoint.path.name}"
        )
    old_batch = global_batch(before, checkpoint.state["processes"])
    new_batch = global_batch(config, processes)
    if old_batch != new_batch:
        raise ValueError(
            f"train_batch_size={config['train_batch_size']}, gradient_accumulation_steps="
            f"{config['gradient_accumulation_steps']}, {processes} processes: {new_batch} samples per step; {where} "
            f"{old_batch} ({checkpoint.state['processes']} processes); the product of the three must be {old_batch}"
        )


def check_samples(checkpoint: Checkpoint, samples_sha256: str, names: Sequence[str]) -> None:
    """Check that the training samples are those of the checkpoint. Their folder may have moved.

    Args:
        checkpoint: checkpoint from which the run resumes.
        samples_sha256: hash of the samples of this run (`Feed.samples_sha256`).
        names: names of the options that select the data, for the message.

    Raises:
        ValueError: if the samples or their order differ.
    """
    if checkpoint.state["samples"] != samples_sha256:
        raise ValueError(
            f"{', '.join(names)}: the samples differ from those that {checkpoint.path.name} was trained with; use the same "
            "samples, or another output_dir for a new run"
        )


def global_batch(config: dict[str, Any], processes: int) -> int:
    """Return the number of samples per optimiser step over all processes and micro-batches."""
    return config["train_batch_size"] * config["gradient_accumulation_steps"] * processes


def _shortest_difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Return only the entries that differ if both values are dicts, otherwise both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
        return {k: old.get(k) for k in sorted(keys)}, {k: new.get(k) for k in sorted(keys)}
    return old, new
