"""Compute FID and CLIP score of a folder of images or clips, or of a prompts file that a model samples first.

python eval/fid_clip.py samples/ --reference coco/ --inception weights-inception-2015-12-05-6726825d.pth \\
    --clip openai/clip-vit-large-patch14 --prompts captions.jsonl
python eval/fid_clip.py eval/demo_images.jsonl --model tiny-sd3 --output-dir samples/ \\
    --reference dense/

Without --inception the distance is fd_tiny, of the shipped extractor, which knows the demo's pictures only.
Without --clip there is no CLIP score, without --reference no distance.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from dit_accel.cli.options import ModelOptions, SamplingOptions
from dit_accel.environment import machine, versions
from dit_accel.eval.metrics.choices import TINY, Given
from dit_accel.eval.metrics.networks import Networks, load_networks
from dit_accel.eval.metrics.score import open_reference, score
from dit_accel.eval.view.table import metrics_lines
from dit_accel.files import check_writable, write_json
from dit_accel.sampling.generate import generate
from dit_accel.sampling.load import load_pipeline
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompt_sets import load_prompts
from dit_accel.sampling.set_plan import planned_set, shard_of
from dit_accel.sampling.sets import SampleSet


@dataclass
class Args:
    """Command line."""

    source: tyro.conf.Positional[Path]
    """Folder of images or of clips (as frames), or a prompts file."""
    reference: Path | None = None
    """Folder of real images or of dense samples, or its saved measurement (.safetensors)."""
    inception: Path | None = None
    """FID's Inception weights."""
    clip: str | None = None
    """A CLIP model's folder or id on the Hub."""
    clip_revision: str | None = None
    prompts: Path | None = None
    """Prompts file with the ids of the images. Default: the prompts in their manifest."""
    resize: Literal["clean", "tf-legacy", "torch-antialias"] = "clean"
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
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    output: Path | None = None
    """JSON file for the metrics, versions and machine."""


def draw(args: Args, metrics: Sequence[str], networks: Networks) -> SampleSet:
    """Sample a prompts file, after checking everything that the metrics will need."""
    if args.model is None or args.output_dir is None:
        raise ValueError(
            f"source={str(args.source)!r}: must be a folder, or a prompts file with --model and --output-dir"
        )
    drawn, named = load_prompts(args.source), load_prompts(args.prompts or args.source)
    options = ModelOptions(model=args.model, sampling=SamplingOptions(**asdict(args.sampling)))
    source, sampling = options.resolve()
    reference = open_reference(args.reference)
    load_networks(networks.arguments(), metrics)
    pipe = load_pipeline(source, sla=args.sla, ras=args.ras, device=args.device)
    samples = plan_samples(drawn, sampling, seed=args.seed, count=1, layout="ids")
    planned = planned_set(pipe, samples)
    Given(planned, reference, {x.id: x.prompt for x in named}, networks.given).choose(metrics)
    made = generate(
        pipe,
        drawn,
        output_dir=args.output_dir,
        model=args.model,
        sampling=sampling,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    assert made is not None  # the only rank
    return made


def main(args: Args) -> None:
    _, ranks = shard_of()
    if ranks > 1:
        raise ValueError(
            f"WORLD_SIZE={ranks}: must be one process; under torchrun run `dit-accel eval generate`, then "
            "this script on its folder"
        )
    metrics = []
    if args.reference is not None:
        metrics.append(f"fd_{TINY}" if args.inception is None else "fid")
    if args.clip is not None:
        metrics.append("clip_score")
    if not metrics:
        raise ValueError("reference, clip: pass at least one of the two")
    if args.output is not None:
        check_writable(args.output.parent, "output")
    networks = Networks(
        inception=args.inception,
        clip=args.clip,
        clip_revision=args.clip_revision,
        resize=args.resize,
        allow_other_weights=args.allow_other_weights,
    )
    found = score(
        args.source if args.source.is_dir() else draw(args, metrics, networks),
        reference=args.reference,
        prompts=args.prompts,
        metrics=metrics,
        **networks.arguments(),
        batch_size=args.batch_size,
        device=args.device,
    )
    print("\n".join(metrics_lines(found)))
    if args.output is not None:
        about = {"format_version": 2, "versions": versions(), "machine": machine()}
        write_json(args.output, {**about, "metrics": found})


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
