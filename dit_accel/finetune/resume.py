"""Which checkpoint a run begins from, and whether its settings allow to go on from there."""

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
"""Settings that may change when a run goes on, because the weights do not depend on them. The batch size, the
accumulation and the number of processes may change together, and `max_train_steps` where the schedule allows it."""
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
"""Schedules whose learning rates do not depend on the number of steps."""


def choose_checkpoint(output_dir: Path, resume_from: str | None) -> Checkpoint | None:
    """Return the checkpoint to go on from; None for a new run.

    Says on stderr which checkpoints were skipped, and why.

    Args:
        output_dir: folder of the run; may not exist yet.
        resume_from: None for a new run, "latest", or the folder of a checkpoint. "latest" begins a new run if
            there is no checkpoint at all.

    Raises:
        ValueError: a new run in a folder that holds checkpoints; a checkpoint that is damaged or not there; a
            folder that holds newer ones than the named one.
    """
    present = checkpoints(output_dir) if output_dir.is_dir() else []
    if resume_from is None:
        if present:
            raise ValueError(
                f"output_dir={str(output_dir)!r}: holds {present[-1][1].name} of an earlier run; accepted is a folder "
                "without checkpoints, or resume_from_checkpoint='latest' to go on with that run"
            )
        return None
    if resume_from == LATEST:
        found, skipped = find_latest(output_dir, note=lambda line: sys.stderr.write(f"{line}\n"))
        if found is None and skipped:
            raise ValueError(
                f"resume_from_checkpoint='latest': no checkpoint of {str(output_dir)!r} can be used "
                f"({'; '.join(skipped)}); accepted is a folder with a valid one, or with none at all"
            )
        return found
    path = Path(resume_from)
    argument = f"resume_from_checkpoint={resume_from!r}"
    if not path.is_dir():
        raise ValueError(f"{argument}: no such folder; accepted are 'latest' and a checkpoint")
    try:
        chosen = read_checkpoint(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{argument}: {error}; accepted is a valid checkpoint") from None
    newer = [x.name for step, x in present if step > chosen.step]
    if newer:
        raise ValueError(
            f"{argument}: {str(output_dir)!r} holds newer checkpoints ({', '.join(newer)}), which 'latest' would choose "
            "next time; accepted once they are moved away, or with another output_dir"
        )
    return chosen


def check_settings(checkpoint: Checkpoint, config: dict[str, Any], processes: int) -> None:
    """Refuse to go on with other settings than those that the run began with.

    Args:
        config: the resolved settings of this run, as plain values for JSON.
        processes: the number of processes of this run.

    Raises:
        ValueError: a setting differs that changes the result; the message names it and both values.
    """
    before: dict[str, Any] = checkpoint.state["config"]
    where = f"resume_from_checkpoint: {checkpoint.path.name} was trained with"
    for name in sorted(before.keys() | config.keys()):
        old, new = before.get(name), config.get(name)
        if name not in FREE and old != new:
            old, new = _shortest_difference(old, new)
            raise ValueError(
                f"{name}={new!r}: {where} {name}={old!r}; accepted is that value, or another output_dir for a new run"
            )
    old, new = before.get("max_train_steps"), config.get("max_train_steps")
    schedule = config.get("lr_scheduler", "constant")
    if old != new and schedule not in CONSTANT_SCHEDULES:
        raise ValueError(
            f"max_train_steps={new!r}: {where} {old!r}, which lr_scheduler={schedule!r} depends on; accepted is that "
            f"value (other ones with {' or '.join(map(repr, CONSTANT_SCHEDULES))})"
        )
    if new is not None and new < checkpoint.step:
        raise ValueError(
            f"max_train_steps={new}: {checkpoint.path.name} has more steps already; accepted is at least {checkpoint.step}"
        )
    old_batch = global_batch(before, checkpoint.state["processes"])
    new_batch = global_batch(config, processes)
    if old_batch != new_batch:
        raise ValueError(
            f"train_batch_size={config['train_batch_size']}, gradient_accumulation_steps="
            f"{config['gradient_accumulation_steps']}, {processes} processes: {new_batch} samples a step; {where} "
            f"{old_batch} ({checkpoint.state['processes']} processes); accepted are values whose product is {old_batch}"
        )


def check_samples(checkpoint: Checkpoint, samples_sha256: str, names: Sequence[str]) -> None:
    """Refuse to go on with other samples than those that the run began with, wherever their folder is now.

    Args:
        samples_sha256: of the samples of this run (`Feed.samples_sha256`).
        names: names of the options that may name the data, for the message.

    Raises:
        ValueError: they are other samples, or in another order.
    """
    if checkpoint.state["samples"] != samples_sha256:
        raise ValueError(
            f"{', '.join(names)}: the samples are other ones than those that {checkpoint.path.name} was trained with; "
            "accepted are the same, or another output_dir for a new run"
        )


def global_batch(config: dict[str, Any], processes: int) -> int:
    """Return the samples of an optimiser step, over all processes and micro-batches."""
    return config["train_batch_size"] * config["gradient_accumulation_steps"] * processes


def _shortest_difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Return the differing entries only, where both are mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
        return {k: old.get(k) for k in sorted(keys)}, {k: new.get(k) for k in sorted(keys)}
    return old, new
