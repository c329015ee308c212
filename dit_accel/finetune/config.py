"""`FinetuneConfig`: every option of fine-tuning. Names are those of the training scripts of diffusers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dit_accel.config import SLAConfig
from dit_accel.config.base import as_lists, is_int, suggest
from dit_accel.finetune.checks import NUMBERS, SECRETS, bucket_sizes, check_fields
from dit_accel.finetune.contradictions import check_combinations

SLA_DEFAULTS: dict[str, Any] = {"topk": 0.1, "crossover": "never"}
"""Defaults of `sla` that differ from `SLAConfig`, whose own are for models that were not fine-tuned."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of one fine-tuning run.

    Raises:
        ValueError: a value that its field does not accept, or two options that contradict each other.
    """

    # Model ------------------------------------------------------------------------------------------
    family: str | None = None
    """Family that these settings are meant for: "wan", "sd3", "lumina" or "lumina2". A model of another family is
    refused. Default: any."""
    pretrained_model_name_or_path: str = "tiny-wan"
    """Diffusers repository: hub id, folder, or an embedded model ("tiny-wan", "tiny-sd3", "tiny-lumina2")."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository. Default: the main branch."""
    variant: str | None = None
    """Variant of the weight files, such as "fp16"."""
    cache_dir: str | None = None
    """Folder for downloads. Default: that of huggingface_hub."""
    output_dir: str = "sla-finetuned"
    """Folder for checkpoints, logs and the result."""
    sla: dict[str, Any] = field(default_factory=dict)
    """Fields of `SLAConfig`. Defaults as there, except topk=0.1 and crossover="never"."""
    router: Literal["fixed", "learned"] = "fixed"
    """"fixed": key blocks are ranked as `sla.router` says. "learned": each layer trains a scorer."""

    # Data: one of three sources ---------------------------------------------------------------------
    instance_data_dir: str | None = None
    """Folder of videos or images with captions, which are encoded while training runs."""
    precomputed_dir: str | None = None
    """Folder that `dit-accel precompute` wrote."""
    prompts: str | None = None
    """Prompts file (.txt, .jsonl, .csv, .tsv) or shipped set (smoke, demo, demo-images): the dense model samples the
    latents that are trained on."""
    num_teacher_samples: int | None = None
    """Samples made from `prompts`, which are repeated with other seeds if needed. Default: one a prompt."""
    teacher_num_inference_steps: int | None = None
    """Steps of these samples. Default: that of the pipeline."""
    teacher_guidance_scale: float | None = None
    """Guidance scale of these samples. Default: that of the pipeline."""
    caption_column: str = "text"
    """Column of metadata files that holds the caption."""
    video_column: str = "file_name"
    """Column of metadata files that holds the path of the video or image."""
    height: int | None = None
    """Height in pixels, with `width`. Default: that of each file, rounded down to what the model accepts; with `prompts`
    that of the pipeline's call, of the demo for an embedded model. Sizes in a prompts file win."""
    width: int | None = None
    """Width in pixels, with `height`."""
    num_frames: int | None = None
    """Frames of a clip: 4k+1 for Wan2.1, 1 for images. Default: as many as each file has and the model accepts; with
    `prompts` as for `height`."""
    fps: float | None = None
    """Frames per second that clips of `instance_data_dir` are resampled to, and of validation clips. Default: all frames
    as they are, and 16."""
    buckets: str | None = None
    """Several sizes in one run, "F,H,W;F,H,W", instead of height, width, num_frames. Each file takes the nearest one;
    samples of `prompts` take them in turn."""
    max_sequence_length: int | None = None
    """Text tokens; sampling has to use the same number. Default: that of the pipeline; with `precomputed_dir` that of the
    data."""

    # Objective --------------------------------------------------------------------------------------
    stages: tuple[Literal["regression", "distillation"], ...] = ("distillation",)
    """"regression": fits the weights of sparse attention, where it has some, to the dense attention outputs of each layer.
    "distillation": trains the whole model on `loss`."""
    regression_steps: int = 200
    """Optimiser steps of the regression stage."""
    regression_learning_rate: float = 1e-2
    """Learning rate of the regression stage."""
    regression_topk: tuple[float, ...] = ()
    """Regression: each step draws its topk from this list. Default: `sla.topk`."""
    loss: Literal["distillation", "diffusion", "mix"] = "distillation"
    """"distillation": match the velocity of the dense model, frozen as it is before training. "diffusion": match
    noise - latents. "mix": both."""
    diffusion_weight: float | None = None
    """Share of the diffusion loss in loss="mix", in (0, 1). Default: 0.5."""
    targets: Literal["conditional", "mixed", "guided"] = "mixed"
    """"conditional": captions are always seen. "mixed": some captions are replaced by the empty one, so that
    both halves of guided sampling are trained. "guided": the student's conditional prediction learns the guided
    one of the teacher; sample such a model with guidance_scale=1."""
    guidance_scale: float | None = None
    """Guidance scale of targets="guided", above 1."""
    caption_dropout: float | None = None
    """Share of captions that targets="mixed" replaces, in (0, 1). Default: 0.1."""
    weighting_scheme: Literal["none", "uniform", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = (
        "none"
    )
    """Density of noise levels (logit_normal, mode; else uniform) and weight of the loss (sigma_sqrt, cosmap; else 1),
    as in the SD3 scripts of diffusers. "uniform" is another name for "none"."""
    logit_mean: float = 0.0
    """Mean of "logit_normal"; a positive one prefers high noise levels."""
    logit_std: float = 1.0
    """Standard deviation of "logit_normal"."""
    mode_scale: float = 1.29
    """Scale of "mode"."""
    flow_shift: float | None = None
    """Shift s of noise levels, u -> s u / (1 + (s - 1) u). Default: that of the model's scheduler."""

    # Parameters -------------------------------------------------------------------------------------
    train: Literal["all", "lora", "sla"] = "all"
    """"all": every weight of the transformer. "lora": low-rank adapters. "sla": the weights of sparse attention alone.
    The weights of sparse attention always train."""
    rank: int = 16
    """Rank of the adapters."""
    lora_alpha: int | None = None
    """Scale of the adapters: lora_alpha / rank. Default: `rank`."""
    lora_layers: str | None = None
    """Names of the modules that get adapters, comma-separated. Default: all projections of attention."""
    topk_start: float | None = None
    """Sparsity annealing: topk of the first step, above `sla.topk`."""
    anneal_steps: int | None = None
    """Steps in which topk falls from `topk_start` to `sla.topk`."""

    # Optimisation -----------------------------------------------------------------------------------
    train_batch_size: int = 1
    """Samples a process in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes of an optimiser step."""
    max_train_steps: int = 1000
    """Optimiser steps of the distillation stage."""
    learning_rate: float = 1e-5
    """Learning rate of the model's weights or adapters."""
    sla_learning_rate: float | None = None
    """Learning rate of the weights of sparse attention. Default: `learning_rate`."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Learning rate schedule of diffusers."""
    lr_warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    optimizer: Literal["adamw", "prodigy"] = "adamw"
    """"prodigy" needs the package prodigyopt and a learning rate near 1."""
    use_8bit_adam: bool = False
    """AdamW of bitsandbytes, whose state takes a quarter of the memory."""
    adam_beta1: float = 0.9
    """First decay rate of the optimiser."""
    adam_beta2: float = 0.999
    """Second decay rate of the optimiser."""
    adam_weight_decay: float = 1e-2
    """Weight decay of matrices; biases, norms and the weights of sparse attention have none."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of the optimiser."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Dtype of the computation. Weights that train are kept in fp32; the VAE encodes in fp32."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of keeping them."""
    use_ema: bool = False
    """Keep a moving average of the trained weights and write it as the result."""
    ema_decay: float = 0.999
    """Decay of the moving average."""
    max_nonfinite: int = 10
    """Steps with a loss or gradient that is not finite are skipped; more of them than this end the run."""
    seed: int = 0
    """Decides order, noise, noise levels and dropout."""
    allow_tf32: bool = False
    """Matrix products of fp32 in TF32 on GPUs that have it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser over all processes (FSDP2)."""

    # Checkpoints ------------------------------------------------------------------------------------
    checkpointing_steps: int = 500
    """Steps from one checkpoint to the next."""
    checkpointing_minutes: float | None = None
    """Minutes from one checkpoint to the next, beside `checkpointing_steps`. Default: steps alone decide."""
    checkpoints_total_limit: int | None = None
    """Older checkpoints than this many are deleted. Default: all are kept."""
    resume_from_checkpoint: str | None = None
    """"latest", or the folder of a checkpoint. Default: begin anew."""

    # Validation and reports -------------------------------------------------------------------------
    validation_prompts: str | None = None
    """Prompts that are sampled during training, separated by ":::", or a prompts file. Default: no validation."""
    validation_steps: int | None = None
    """Steps from one validation to the next, beside one before the first step and one after the last. Default: 500."""
    num_validation_videos: int = 1
    """Samples a prompt."""
    validation_num_inference_steps: int | None = None
    """Steps of these samples. Default: that of the pipeline."""
    validation_guidance_scale: float | None = None
    """Guidance scale of these samples. Default: that of the pipeline, and 1 with targets="guided"."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Tracker. Values are written to a JSON lines file in any case."""
    tracker_name: str = "dit-accel-finetune"
    """Name of the project in the tracker."""
    logging_dir: str = "logs"
    """Folder of the tracker, in `output_dir`."""

    # Result -----------------------------------------------------------------------------------------
    merge: bool = False
    """Write a whole diffusers repository with the trained weights merged in, beside the SLA checkpoint."""
    push_to_hub: bool = False
    """Upload the result."""
    hub_model_id: str | None = None
    """Repository to upload to. Default: the name of `output_dir`."""
    hub_token: str | None = field(default=None, repr=False)
    """Token for the upload; it is never written. Default: that of `hf auth login`."""

    def __post_init__(self) -> None:
        for name in ("stages", "regression_topk"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        object.__setattr__(self, "sla", self._read_sla())
        check_combinations(self)

    def _read_sla(self) -> dict[str, Any]:
        """Return all fields of sparse attention; without the router, if that is learned."""
        given = {**SLA_DEFAULTS, **self.sla}
        router = given.get("router", "spread")
        if router == "learned":
            raise ValueError(
                "sla.router='learned': accepted is router='learned', which decides on the router"
            )
        learned = self.router == "learned"
        if learned and router != "spread":
            raise ValueError(
                f"sla.router={router!r}: accepted without router='learned', which replaces it"
            )
        try:
            values = SLAConfig.from_dict({**given, "router": "learned" if learned else router})
        except ValueError as error:
            raise ValueError(f"sla.{error}" if "=" in str(error) else f"sla: {error}") from None
        return {k: x for k, x in values.to_dict().items() if k != "router" or not learned}

    @property
    def hub(self) -> dict[str, str]:
        """Arguments of downloads from the hub: `revision` and `cache_dir`, where they are given."""
        given = {"revision": self.revision, "cache_dir": self.cache_dir}
        return {name: x for name, x in given.items() if x is not None}

    @property
    def sla_config(self) -> SLAConfig:
        """Settings of sparse attention."""
        learned = {"router": "learned"} if self.router == "learned" else {}
        return SLAConfig.from_dict({**self.sla, **learned})

    @property
    def sizes(self) -> list[tuple[int | None, int | None, int | None]]:
        """(frames, height, width) of each bucket in pixels; None stands for a default."""
        if self.buckets is not None:
            return list(bucket_sizes(self.buckets))
        return [(self.num_frames, self.height, self.width)]

    @property
    def weights_dtype(self) -> Literal["fp32", "fp16", "bf16"]:
        """Dtype that the transformer is loaded in: fp32 if all of it trains, else that of the computation."""
        if self.train == "all" or self.mixed_precision == "no":
            return "fp32"
        return self.mixed_precision

    @property
    def has_sla_weights(self) -> bool:
        """Whether sparse attention has weights that train."""
        return self.router == "learned" or self.sla_config.has_weights

    def check_early(self, outline: Any, *, dry_run: bool = False) -> None:
        """Check what depends on the model and on this machine, before anything is loaded.

        Args:
            outline: result of `dit_accel.sampling.outline.read_outline` for the model.
            dry_run: accept a config without data, and any number of processes.

        Raises:
            ValueError: an option that the model or the machine does not accept.
        """
        from dit_accel.finetune.model_checks import check_model

        check_model(self, outline, dry_run=dry_run)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON or YAML, without secrets. `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {key: as_lists(x) for key, x in values.items() if key not in SECRETS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuneConfig":
        """Make a config of field names and values.

        Raises:
            ValueError: an unknown key, with a suggestion, or a value that is not accepted.
        """
        names = [x.name for x in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r}{suggest(str(key), names)}; accepted are the options of "
                    "`dit-accel finetune`"
                )
        return cls(**{key: _typed(key, x) for key, x in values.items()})


def _typed(name: str, value: Any) -> Any:
    """Return a value of JSON or YAML, which have lists for tuples and 60 for 60.0, in the type of its field."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if is_int(value) and name in (*NUMBERS, "fps") else value
