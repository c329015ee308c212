"""`teacher_samples`: sample training data from prompts with the dense model, and store it in a folder."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_accel.finetune.data.buckets import Bucket
from dit_accel.finetune.data.encode import Encoder, encode_captions, size_rules
from dit_accel.finetune.data.model_identity import model_identity
from dit_accel.finetune.data.store import PrecomputedSamples, open_store
from dit_accel.finetune.data.writer import store_writer
from dit_accel.finetune.stop import CutShort
from dit_accel.runtime.install import installations_of
from dit_accel.sampling.batches import progress_bar, quiet
from dit_accel.sampling.call import run_latents
from dit_accel.sampling.plan import Sample, plan_batches
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.settings import Sampling, check_seed, with_steps


def teacher_samples(
    trainable: Encoder,
    prompts: Sequence[PromptRecord],
    output_dir: str | os.PathLike,
    *,
    sampling: Sampling,
    buckets: Sequence[Bucket] = (),
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> PrecomputedSamples:
    """Sample the latents that the folder does not hold yet, and open the folder.

    A call after a kill continues with the missing samples. If several processes call this function, one of them
    samples and the others wait.

    Args:
        trainable: the model, without acceleration.
        prompts: prompts to sample. Their own sizes and seeds take precedence over the other arguments.
        output_dir: a new or empty folder, or the folder of an earlier call.
        sampling: arguments of the pipeline calls. Height, width and, for clips, num_frames are required unless
            `buckets` is given.
        buckets: sizes that the samples use in turn.
        num_samples: number of samples. Prompts are repeated with other seeds. Default: one sample per prompt.
        seed: seed of the run. Sample i uses `seed + i`.
        batch_size: number of samples per pipeline call.
        progress: show a progress bar on stderr.
        stopping: function called before each pipeline call. If it returns True, sampling stops.

    Returns:
        The samples of the folder.

    Raises:
        CutShort: if `stopping` returned True. Finished samples are in the folder.
        ValueError: if a size is missing or not supported, or if output_dir holds other data.
        RuntimeError: if acceleration is enabled, or if a sample could not be made or written.
    """
    pipe = trainable.pipe
    if installations_of(pipe):
        raise RuntimeError(
            "pipe: the teacher must be dense, but acceleration is enabled; call dit_accel.disable(pipe) first"
        )
    base = with_steps(pipe, sampling)
    samples = _planned(trainable, prompts, base, buckets, num_samples or len(prompts), seed)
    names = {x.id: str(_bucket(trainable, x.sampling)) for x in samples}
    records = {x.id: _source(x) for x in samples}
    model = model_identity(pipe, transformer=True)
    with store_writer(
        output_dir,
        settings=_settings(base),
        model=model,
        sources=records,
        wait=True,
        argument="teacher samples",
    ) as writer:
        missing = [x for x in samples if x.id not in writer.done]
        bar = {"total": len(samples), "initial": len(samples) - len(missing)}
        with (
            progress_bar(
                desc="teacher samples", disable=not (progress and missing), **bar
            ) as shown,
            quiet(pipe),
        ):
            for batch in plan_batches(missing, batch_size):
                if stopping():
                    raise CutShort
                latents = run_latents(pipe, batch).float().cpu()
                conditions = encode_captions(trainable, [x.record.prompt for x in batch])
                for sample, x, y in zip(batch, latents, conditions, strict=True):
                    writer.add(sample.id, names[sample.id], (x, y), records[sample.id])
                    shown.update()
        writer.finish(list(names))
    return open_store(Path(output_dir), model=model, argument="teacher samples")


def _planned(
    trainable: Encoder,
    prompts: Sequence[PromptRecord],
    sampling: Sampling,
    buckets: Sequence[Bucket],
    count: int,
    seed: int,
) -> list[Sample]:
    """Return the samples to make, and check that the model supports their sizes."""
    if not prompts:
        raise ValueError("prompts=[]: must hold at least one prompt")
    check_seed(seed, count)
    rules = size_rules(trainable)
    samples = []
    for i in range(count):
        turn, place = divmod(i, len(prompts))
        record = prompts[place]
        sized = sampling
        if buckets:
            # Shift the buckets in each turn, so that a prompt is sampled in different buckets.
            bucket = buckets[(i + turn) % len(buckets)]
            frames = bucket.frames if rules.frame_step else None
            sized = sampling.overridden(num_frames=frames, height=bucket.height, width=bucket.width)
        sized = sized.overridden(**record.sampling_arguments())
        own = seed + i if record.seed is None else record.seed + turn
        check_seed(own)
        samples.append(Sample(f"{record.id}/{turn}", record, own, sized, video=""))
        rules.check(_bucket(trainable, sized), f"prompt {record.id!r}")
    return samples


def _bucket(trainable: Encoder, sampling: Sampling) -> Bucket:
    clips = trainable.frames_rule[0] > 0
    frames = sampling.num_frames if clips else 1
    sizes = {"height": sampling.height, "width": sampling.width, "num_frames": frames}
    for name, value in sizes.items():
        if value is None:
            raise ValueError(f"{name}=None: required to sample from prompts")
    if not clips and sampling.num_frames is not None:
        raise ValueError(
            f"num_frames={sampling.num_frames}: must be None, because this model makes images"
        )
    return Bucket(sizes["num_frames"], sizes["height"], sizes["width"])  # type: ignore[arg-type]


def _settings(sampling: Sampling) -> dict[str, Any]:
    """Return the settings that all samples share. Size and seed are stored with each sample."""
    names = ("num_inference_steps", "guidance_scale", "max_sequence_length")
    return {"made_from": "prompts"} | {x: getattr(sampling, x) for x in names}


def _source(sample: Sample) -> dict[str, Any]:
    x = sample.sampling
    return {
        "prompt": sample.record.prompt,
        "negative_prompt": x.negative_prompt,
        "seed": sample.seed,
        "num_frames": x.num_frames,
        "height": x.height,
        "width": x.width,
    }
