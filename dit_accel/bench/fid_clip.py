"""FID and CLIP score of a folder, or of a prompts file that a model samples first (eval/fid_clip.py)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from dit_accel.demo import default_sampling
from dit_accel.environment import machine, versions
from dit_accel.eval.metrics.choices import TINY, Given
from dit_accel.eval.metrics.networks import Networks
from dit_accel.eval.metrics.score import load_networks, open_reference, score
from dit_accel.eval.view.table import metrics_lines
from dit_accel.files import EMBEDDED_MODELS, check_writable, model_source, write_json
from dit_accel.sampling.generate import generate
from dit_accel.sampling.load import load_pipeline
from dit_accel.sampling.outline import read_outline
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompt_sets import load_prompts
from dit_accel.sampling.set_plan import planned_set, shard_of
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling


@dataclass(frozen=True)
class UncheckedSampling(Sampling):
    """Arguments of the pipeline call. Default: the defaults of the pipeline."""

    def __post_init__(self) -> None:
        pass  # checked by `FidClip.run`, whose errors are printed as one line


@dataclass
class FidClip:
    """FID and CLIP score of images or clips."""

    source: Positional[Path]
    """Folder of images or of clips (as frames), or a prompts file."""
    reference: Path | None = None
    """Folder of real images or of dense samples, or its saved measurement (.safetensors)."""
    inception: Path | None = None
    """FID's Inception weights."""
    clip: str | None = None
    """A CLIP model's folder or id on the Hub."""
    clip_revision: str | None = None
    """Branch, tag or commit of the CLIP model."""
    prompts: Path | None = None
    """Prompts file with the ids of the images. Default: the prompts in their manifest."""
    resize: Literal["clean", "tf-legacy", "torch-antialias"] = "clean"
    """Way to resize pictures for Inception."""
    allow_other_weights: bool = False
    """Take Inception weights of another sha256."""
    model: str | None = None
    """Pipeline that samples the prompts: a folder or id on the Hub."""
    output_dir: Path | None = None
    """Folder of the new samples; a run that was killed continues."""
    sla: str | None = None
    """Sparse attention: a preset or a YAML file. Default: dense."""
    ras: str | None = None
    """Region-adaptive sampling: a preset or a YAML file. Default: none."""
    sampling: OmitArgPrefixes[UncheckedSampling] = field(default_factory=UncheckedSampling)
    seed: int = 0
    """Seed of the first sample. Later samples count up from it."""
    batch_size: int = 8
    """Number of samples in a pipeline call, and of pictures that a network reads at once."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    output: Path | None = None
    """JSON file for the metrics, versions and machine."""

    def run(self) -> None:
        """Sample if the source is a prompts file, print the metrics, and write them to `output`.

        Raises:
            ValueError: an argument is invalid.
        """
        _, ranks = shard_of()
        if ranks > 1:
            raise ValueError(
                f"WORLD_SIZE={ranks}: must be one process; under torchrun run `dit-accel eval generate`, then "
                "this script on its folder"
            )
        metrics = []
        if self.reference is not None:
            metrics.append(f"fd_{TINY}" if self.inception is None else "fid")
        if self.clip is not None:
            metrics.append("clip_score")
        if not metrics:
            raise ValueError("reference, clip: pass at least one of the two")
        if self.output is not None:
            check_writable(self.output.parent, "output")
        networks = Networks(
            inception=self.inception,
            clip=self.clip,
            clip_revision=self.clip_revision,
            resize=self.resize,
            allow_other_weights=self.allow_other_weights,
        )
        found = score(
            self.source if self.source.is_dir() else self._sample(metrics, networks),
            reference=self.reference,
            prompts=self.prompts,
            metrics=metrics,
            **networks.arguments(),
            batch_size=self.batch_size,
            device=self.device,
        )
        print("\n".join(metrics_lines(found)))
        if self.output is not None:
            about = {"format_version": 2, "versions": versions(), "machine": machine()}
            write_json(self.output, {**about, "metrics": found})

    def _sample(self, metrics: Sequence[str], networks: Networks) -> SampleSet:
        """Check everything that the metrics need, then sample the prompts file."""
        if self.model is None or self.output_dir is None:
            raise ValueError(
                f"source={str(self.source)!r}: must be a folder, or a prompts file with --model and --output-dir"
            )
        drawn, named = load_prompts(self.source), load_prompts(self.prompts or self.source)
        source, sampling = model_source(self.model), Sampling(**asdict(self.sampling))
        if self.model in EMBEDDED_MODELS:
            sampling = sampling.filled(default_sampling(read_outline(source)))
        reference = open_reference(self.reference)
        load_networks(networks.arguments(), metrics)
        pipe = load_pipeline(source, sla=self.sla, ras=self.ras, device=self.device)
        samples = plan_samples(drawn, sampling, seed=self.seed, count=1, layout="ids")
        planned = planned_set(pipe, samples)
        Given(planned, reference, {x.id: x.prompt for x in named}, networks.given).choose(metrics)
        made = generate(
            pipe,
            drawn,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        assert made is not None  # the only rank
        return made
