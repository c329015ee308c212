"""`open_samples`: open the training data of a `FinetuneConfig`."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_accel.files import EMBEDDED_MODELS
from dit_accel.finetune.checks import SOURCES
from dit_accel.finetune.data.buckets import Bucket, parse_buckets
from dit_accel.finetune.data.captions import read_captions
from dit_accel.finetune.data.encode import Encoder, size_rules
from dit_accel.finetune.data.model_identity import model_identity
from dit_accel.finetune.data.samples import Samples
from dit_accel.finetune.data.store import PrecomputedSamples, open_store
from dit_accel.sampling.settings import Sampling

TEACHER_FOLDER = "teacher-samples"
"""Subfolder of the output folder for latents that are sampled from prompts."""


def open_samples(
    config: Any,
    trainable: Encoder,
    *,
    progress: bool = True,
    stopping: Callable[[], bool] = lambda: False,
) -> Samples:
    """Open the training data of a run. Acceleration must not be enabled on the pipeline yet.

    The function checks everything that does not require decoding: captions, sizes, and the identity of the model.

    Args:
        config: settings of the run (`FinetuneConfig`).
        trainable: the model.
        progress: show progress bars on stderr.
        stopping: function that returns True if a signal was received. Sampling from `prompts` then stops.

    Returns:
        The samples of `precomputed_dir` or `instance_data_dir`, or samples made from `prompts`.

    Raises:
        ValueError: if the number of data sources is not one, or if the data cannot be used. The message names the
            option.
        RuntimeError: if samples of `prompts` could not be made or written.
        CutShort: if `stopping` returned True while samples were made.
    """
    given = [x for x in SOURCES if getattr(config, x) is not None]
    if len(given) != 1:
        shown = ", ".join(f"{x}={getattr(config, x)!r}" for x in SOURCES)
        raise ValueError(f"{shown}: set exactly one of them")
    if config.precomputed_dir is not None:
        return _precomputed(config.precomputed_dir, trainable, config.max_sequence_length)
    if config.instance_data_dir is not None:
        return _raw(config, trainable, progress)
    return _from_prompts(config, trainable, progress, stopping)


def _precomputed(folder: str, trainable: Encoder, tokens: int | None) -> PrecomputedSamples:
    store = open_store(folder, model=model_identity(trainable.pipe))
    stored = store.contents.settings["max_sequence_length"]
    if tokens not in (None, stored):
        raise ValueError(
            f"max_sequence_length={tokens}: the samples of precomputed_dir={folder!r} have {stored} text tokens; use that "
            "number, or do not set the option"
        )
    rules = size_rules(trainable)
    found = {(x["bucket"], tuple(x["shapes"]["latents"])) for x in store.contents.samples.values()}
    for name, shape in sorted(found):
        bucket = Bucket.parse(name)
        rules.check(bucket, f"precomputed_dir={str(folder)!r}")
        accepted = tuple(trainable.latent_shape(bucket.height, bucket.width, bucket.frames))
        if shape != accepted:
            raise ValueError(
                f"precomputed_dir={str(folder)!r}: latents of {bucket} have the shape {list(shape)}, but this model "
                f"expects {list(accepted)}; use a folder that was made with this model"
            )
    return store


def _raw(config: Any, trainable: Encoder, progress: bool) -> Samples:
    from dit_accel.finetune.data.raw import RawSamples
    from dit_accel.finetune.data.sources import find_sources, size_choice

    sizes = size_choice(
        size_rules(trainable),
        buckets=config.buckets,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        fps=config.fps,
    )
    items = read_captions(
        config.instance_data_dir,
        caption_column=config.caption_column,
        video_column=config.video_column,
    )
    sources, _ = find_sources(items, sizes, progress=progress)
    return RawSamples(sources, trainable, fps=sizes.fps)


def _from_prompts(
    config: Any, trainable: Encoder, progress: bool, stopping: Callable[[], bool]
) -> Samples:
    from dit_accel.finetune.data.from_prompts import teacher_samples
    from dit_accel.sampling.prompt_sets import load_prompts

    buckets = () if config.buckets is None else parse_buckets(config.buckets, size_rules(trainable))
    clips = trainable.frames_rule[0] > 0
    sampling = Sampling(
        height=config.height,
        width=config.width,
        num_frames=config.num_frames if clips else None,
        num_inference_steps=config.teacher_num_inference_steps,
        guidance_scale=config.teacher_guidance_scale,
        max_sequence_length=getattr(trainable, "text_tokens", None),
    )
    if not buckets:
        embedded = config.pretrained_model_name_or_path in EMBEDDED_MODELS
        sampling = sampling.filled(
            default_size(type(trainable.pipe), trainable.pipe, embedded=embedded)
        )
    return teacher_samples(
        trainable,
        load_prompts(config.prompts),
        Path(config.output_dir) / TEACHER_FOLDER,
        sampling=sampling,
        buckets=buckets,
        num_samples=config.num_teacher_samples,
        seed=config.seed,
        batch_size=config.train_batch_size,
        progress=progress,
        stopping=stopping,
    )


def default_size(pipeline: type, pipe: Any, *, embedded: bool) -> dict[str, Any]:
    """Return the default height, width and, for clips, num_frames of samples.

    Args:
        pipeline: class of the pipeline.
        pipe: the pipeline or its outline.
        embedded: True for an embedded model. The sizes of the demo are returned then.
    """
    from dit_accel import demo

    parameters = inspect.signature(pipeline.__call__).parameters
    clips = "num_frames" in parameters
    names = ("height", "width", *(("num_frames",) if clips else ()))
    if embedded:
        own = demo.default_sampling(pipe)
        return {name: own[name] for name in names}
    if clips:
        return {name: parameters[name].default for name in names}
    # Image pipelines compute their default size from the config.
    return dict.fromkeys(names, pipe.transformer.config.sample_size * pipe.vae_scale_factor)
