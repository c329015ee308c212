"""`FinetuneConfig`: all options of fine-tuning. Names follow the training scripts of diffusers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dit_accel.config import SLAConfig
from dit_accel.config.base import as_lists, is_int, suggest
from dit_accel.finetune.checks import NUMBERS, SECRETS, bucket_sizes, check_fields
from dit_accel.finetune.contradictions import check_combinations

SLA_DEFAULTS: dict[str, Any] = {"topk": 0.1, "crossover": "never"}
"""Defaults of `sla` that differ from `SLAConfig`. The defaults of `SLAConfig` suit models without fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of one fine-tuning run.

    Raises:
        ValueError: if a value is invalid, or if two options contradict each other.
    """

    # Model ------------------------------------------------------------------------------------------
    family: str | None = None
    """Expected model family: "wan", "sd3", "lumina" or "lumina2". A model of another family is an error. Default: any."""
    pretrained_model_name_or_path: str = "tiny-wan"
    """Diffusers repository: hub id, folder, or an embedded model ("tiny-wan", "tiny-sd3", "tiny-lumina2")."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository. Default: the main branch."""
    variant: str | None = None
    """Variant of the weight files, such as "fp16"."""
    cache_dir: str | None = None
    """Folder for downloads. Default: the cache of huggingface_hub."""
    output_dir: str = "sla-finetuned"
    """Folder for checkpoints, logs and the result."""
    sla: dict[str, Any] = field(default_factory=dict)
    """Fields of `SLAConfig`. Defaults as in `SLAConfig`, except topk=0.1 and crossover="never"."""
    router: Literal["fixed", "learned"] = "fixed"
    """Ranking of key blocks. "fixed": by the rule `sla.router`. "learned": by a matrix per head that trains."""

    # Data: exactly one of three sources -------------------------------------------------------------
    instance_data_dir: str | None = None
    """Folder of videos or images with captions. They are encoded during training."""
    precomputed_dir: str | None = None
    """Folder written by `dit-accel precompute`."""
    prompts: str | None = None
    """Prompts file (.txt, .jsonl, .csv, .tsv) or shipped prompt set (smoke, demo, demo-images). The dense model samples
    the training latents from these prompts."""
    num_teacher_samples: int | None = None
    """Number of samples made from `prompts`. Prompts are repeated with other seeds if needed. Default: one per prompt."""
    teacher_num_inference_steps: int | None = None
    """Sampling steps for samples of `prompts`. Default: the default of the pipeline."""
    teacher_guidance_scale: float | None = None
    """Guidance scale for samples of `prompts`. Default: the default of the pipeline."""
    caption_column: str = "text"
    """Column of metadata files that holds the caption."""
    video_column: str = "file_name"
    """Column of metadata files that holds the path of the video or image."""
    height: int | None = None
    """Height in pixels; requires `width`. Default: the height of each file, rounded down to a size that the model supports.
    With `prompts`: the default of the pipeline, or of the demo for an embedded model. Sizes in a prompts file take
    precedence."""
    width: int | None = None
    """Width in pixels; requires `height`. Default: as for `height`."""
    num_frames: int | None = None
    """Number of frames: 4k+1 for Wan2.1, 1 for images. Default: the largest supported number that each file has. With
    `prompts`: as for `height`."""
    fps: float | None = None
    """Frame rate to which clips of `instance_data_dir` are resampled, and frame rate of validation clips. Default: training
    clips keep all frames, and validation clips have 16 frames per second."""
    buckets: str | None = None
    """Several sizes in one run, "F,H,W;F,H,W", instead of height, width and num_frames. Each file uses the nearest bucket.
    Samples of `prompts` use the buckets in turn."""
    max_sequence_length: int | None = None
    """Number of text tokens. Sampling must use the same number. Default: the default of the pipeline, or the number in
    `precomputed_dir`."""

    # Objective --------------------------------------------------------------------------------------
    stages: tuple[Literal["regression", "distillation"], ...] = ("distillation",)
    """Stages to run. "regression": fit the weights of sparse attention, if any, to the dense attention output of each
    layer. "distillation": train the whole model on `loss`."""
    regression_steps: int = 200
    """Number of optimiser steps of the regression stage."""
    regression_learning_rate: float = 1e-2
    """Learning rate of the regression stage."""
    regression_topk: tuple[float, ...] = ()
    """Values of topk from which each step of the regression stage draws one. Default: `sla.topk`."""
    loss: Literal["distillation", "diffusion", "mix"] = "distillation"
    """Training target. "distillation": the velocity of the frozen dense model. "diffusion": noise - latents. "mix": a
    weighted sum of both losses."""
    diffusion_weight: float | None = None
    """Weight of the diffusion loss with loss="mix", in (0, 1). Default: 0.5."""
    targets: Literal["conditional", "mixed", "guided"] = "mixed"
    """Use of captions. "conditional": every sample keeps its caption. "mixed": some captions are replaced by the empty
    caption, so that both model calls of guided sampling are trained. "guided": the student learns the guided velocity of
    the teacher; sample such a model with guidance_scale=1."""
    guidance_scale: float | None = None
    """Guidance scale for targets="guided", above 1."""
    caption_dropout: float | None = None
    """Fraction of captions that targets="mixed" replaces by the empty caption, in (0, 1). Default: 0.1."""
    weighting_scheme: Literal["none", "uniform", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = (
        "none"
    )
    """Distribution of noise levels ("logit_normal", "mode", otherwise uniform) and loss weight ("sigma_sqrt", "cosmap",
    otherwise 1), as in the SD3 scripts of diffusers. "uniform" means the same as "none"."""
    logit_mean: float = 0.0
    """Mean of the "logit_normal" distribution. A positive mean favours high noise levels."""
    logit_std: float = 1.0
    """Standard deviation of the "logit_normal" distribution."""
    mode_scale: float = 1.29
    """Scale of the "mode" distribution."""
    flow_shift: float | None = None
    """Shift s of noise levels, u -> s u / (1 + (s - 1) u). Default: the shift of the model's scheduler."""

    # Parameters -------------------------------------------------------------------------------------
    train: Literal["all", "lora", "sla"] = "all"
    """Parameters to train. "all": every weight of the transformer. "lora": low-rank adapters. "sla": only the weights of
    sparse attention. The weights of sparse attention train with every choice."""
    rank: int = 16
    """Rank of the adapters."""
    lora_alpha: int | None = None
    """Scale of the adapters: their output is multiplied by lora_alpha / rank. Default: `rank`."""
    lora_layers: str | None = None
    """Names of the modules that get adapters, separated by commas. Default: all projections of attention."""
    topk_start: float | None = None
    """Value of topk at the first step of sparsity annealing, above `sla.topk`."""
    anneal_steps: int | None = None
    """Number of steps in which topk falls from `topk_start` to `sla.topk`."""

    # Optimisation -----------------------------------------------------------------------------------
    train_batch_size: int = 1
    """Samples per process in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    max_train_steps: int = 1000
    """Number of optimiser steps of the distillation stage."""
    learning_rate: float = 1e-5
    """Learning rate of the weights of the model, or of the adapters."""
    sla_learning_rate: float | None = None
    """Learning rate of the weights of sparse attention. Default: `learning_rate`."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Learning rate schedule, as in diffusers."""
    lr_warmup_steps: int = 0
    """Number of steps in which the learning rate rises from 0."""
    optimizer: Literal["adamw", "prodigy"] = "adamw"
    """Optimiser. "prodigy" needs the package prodigyopt and a learning rate near 1."""
    use_8bit_adam: bool = False
    """Use AdamW of bitsandbytes. Its state takes a quarter of the memory."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Decay rate of the second moment."""
    adam_weight_decay: float = 1e-2
    """Weight decay of matrices. Biases, norms and the weights of sparse attention do not decay."""
    adam_epsilon: float = 1e-8
    """Value added to the denominator of the optimiser."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; larger gradients are scaled down. 0 disables clipping."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Dtype of the computation; "no" is fp32. Trained weights stay in fp32, and the VAE encodes in fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    use_ema: bool = False
    """Keep a moving average of the trained weights, and write it as the result."""
    ema_decay: float = 0.999
    """Decay rate of the moving average."""
    max_nonfinite: int = 10
    """Number of steps with a non-finite loss or gradient that may be skipped before the run ends."""
    seed: int = 0
    """Seed of the sample order, noise, noise levels and dropout."""
    allow_tf32: bool = False
    """Compute fp32 matrix products in TF32 on GPUs that support it."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over all processes (FSDP2)."""

    # Checkpoints ------------------------------------------------------------------------------------
    checkpointing_steps: int = 500
    """Number of steps between checkpoints."""
    checkpointing_minutes: float | None = None
    """Minutes after which a checkpoint is written even before `checkpointing_steps`. Default: no limit."""
    checkpoints_total_limit: int | None = None
    """Number of checkpoints to keep; older ones are deleted. Default: keep all."""
    resume_from_checkpoint: str | None = None
    """Checkpoint to continue from: "latest", or the folder of a checkpoint. Default: start a new run."""

    # Validation and reports -------------------------------------------------------------------------
    validation_prompts: str | None = None
    """Prompts to sample for validation, separated by ":::", or a prompts file. Default: no validation."""
    validation_steps: int | None = None
    """Number of steps between validations. A run also validates before its first and after its last step. Default: 500."""
    num_validation_videos: int = 1
    """Number of validation samples per prompt."""
    validation_num_inference_steps: int | None = None
    """Sampling steps of validation samples. Default: the default of the pipeline."""
    validation_guidance_scale: float | None = None
    """Guidance scale of validation samples. Default: the default of the pipeline, or 1 with targets="guided"."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Experiment tracker. `log.jsonl` in `output_dir` is written with every choice."""
    tracker_name: str = "dit-accel-finetune"
    """Project name in the tracker."""
    logging_dir: str = "logs"
    """Folder of the tracker, relative to `output_dir`."""

    # Result -----------------------------------------------------------------------------------------
    merge: bool = False
    """Write a complete diffusers repository with the trained weights too."""
    push_to_hub: bool = False
    """Upload the result to the Hugging Face hub."""
    hub_model_id: str | None = None
    """Hub repository for the upload. Default: the name of `output_dir`."""
    hub_token: str | None = field(default=None, repr=False)
    """Hub token for the upload. It is never written to a file. Default: the token of `hf auth login`."""

    def __post_init__(self) -> None:
        for name in ("stages", "regression_topk"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        object.__setattr__(self, "sla", self._read_sla())
        check_combinations(self)

    def _read_sla(self) -> dict[str, Any]:
        """Return all fields of `SLAConfig` as plain values. A learned router is left out: `router` selects it."""
        given = {**SLA_DEFAULTS, **self.sla}
        router = given.get("router", "spread")
        if router == "learned":
            raise ValueError(
                "sla.router='learned': expected a fixed router; use the option router='learned' instead"
            )
        learned = self.router == "learned"
        if learned and router != "spread":
            raise ValueError(
                f"sla.router={router!r}: cannot be combined with router='learned', which replaces it"
            )
        try:
            values = SLAConfig.from_dict({**given, "router": "learned" if learned else router})
        except ValueError as error:
            raise ValueError(f"sla.{error}" if "=" in str(error) else f"sla: {error}") from None
        return {k: x for k, x in values.to_dict().items() if k != "router" or not learned}

    @property
    def hub(self) -> dict[str, str]:
        """Keyword arguments for hub downloads: `revision` and `cache_dir`, if set."""
        given = {"revision": self.revision, "cache_dir": self.cache_dir}
        return {name: x for name, x in given.items() if x is not None}

    @property
    def sla_config(self) -> SLAConfig:
        """Settings of sparse attention, including a learned router."""
        learned = {"router": "learned"} if self.router == "learned" else {}
        return SLAConfig.from_dict({**self.sla, **learned})

    @property
    def sizes(self) -> list[tuple[int | None, int | None, int | None]]:
        """Sizes of the training samples as (frames, height, width); None means the default."""
        if self.buckets is not None:
            return list(bucket_sizes(self.buckets))
        return [(self.num_frames, self.height, self.width)]

    @property
    def weights_dtype(self) -> Literal["fp32", "fp16", "bf16"]:
        """Dtype in which the transformer is loaded: fp32 if all weights train, otherwise the dtype of the computation."""
        if self.train == "all" or self.mixed_precision == "no":
            return "fp32"
        return self.mixed_precision

    @property
    def has_sla_weights(self) -> bool:
        """True if sparse attention has weights to train."""
        return self.router == "learned" or self.sla_config.has_weights

    def check_early(self, outline: Any, *, dry_run: bool = False) -> None:
        """Check the options against the model and this machine, before any weights are loaded.

        Args:
            outline: result of `dit_accel.sampling.outline.read_outline` for the model.
            dry_run: allow a config without data, and any number of processes.

        Raises:
            ValueError: if the model or the machine does not support an option.
        """
        from dit_accel.finetune.model_checks import check_model

        check_model(self, outline, dry_run=dry_run)

    def to_dict(self) -> dict[str, Any]:
        """Return all options except secrets as plain values for JSON or YAML. `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {key: as_lists(x) for key, x in values.items() if key not in SECRETS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuneConfig":
        """Create a config from a dict of field names and values.

        Raises:
            ValueError: if a key is unknown or a value is invalid. The message suggests similar keys.
        """
        names = [x.name for x in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r}{suggest(str(key), names)}; expected an option of "
                    "`dit-accel finetune`"
                )
        return cls(**{key: _typed(key, x) for key, x in values.items()})


def _typed(name: str, value: Any) -> Any:
    """Convert a value of JSON or YAML to the type of its field: a list to a tuple, an int to a float."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if is_int(value) and name in (*NUMBERS, "fps") else value
