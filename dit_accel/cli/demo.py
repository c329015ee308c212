"""`dit-accel demo`: make-data, train, judge."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from dit_accel.cli.options import EMBEDDED, AccelerationOptions, SamplingOptions
from dit_accel.cli.printing import print_json, print_line
from dit_accel.demo.config import ImageTrainConfig, Lumina2TrainConfig, Recipe, TrainConfig
from dit_accel.files import write_json
from dit_accel.sampling.settings import Sampling


class _Unchecked:
    """A recipe as parsed. The command checks only the recipe that it uses, so that errors name one option."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class ClipRecipe(_Unchecked, TrainConfig):
    """Recipe of tiny-wan."""


@dataclass(frozen=True)
class StillRecipe(_Unchecked, ImageTrainConfig):
    """Recipe of tiny-sd3."""


@dataclass(frozen=True)
class Lumina2Recipe(_Unchecked, Lumina2TrainConfig):
    """Recipe of tiny-lumina2."""


@dataclass(kw_only=True)
class MakeData:
    """Write captioned clips of moving shapes: mp4 files and captions.jsonl."""

    output_dir: Path
    """New or empty folder."""
    num_clips: int = 256
    split: Literal["train", "heldout", "all"] = "train"
    """heldout: the 10 % of combinations that train never shows."""
    seed: int = 0
    num_frames: int = 33
    height: int = 64
    width: int = 64
    fps: int = 16

    def run(self) -> None:
        from dit_accel import demo

        print_line(str(demo.make_data(**vars(self))))


@dataclass(kw_only=True)
class Train:
    """Train a demo model from random weights. The same command resumes an interrupted training."""

    output_dir: Path
    """Folder of the diffusers repository to write; new or empty."""
    model: Literal["tiny-wan", "tiny-sd3", "tiny-lumina2"] = "tiny-wan"
    """tiny-wan makes clips, tiny-sd3 and tiny-lumina2 make stills."""
    work_dir: Path | None = None
    """Folder of the checkpoints. Default: the name of the output folder with "-work"."""
    recipe: OmitArgPrefixes[ClipRecipe] = field(default_factory=ClipRecipe)
    """Recipe of tiny-wan."""
    image: StillRecipe = field(default_factory=StillRecipe)
    """Recipe of tiny-sd3."""
    lumina2: Lumina2Recipe = field(default_factory=Lumina2Recipe)
    """Recipe of tiny-lumina2."""
    device: str = "auto"

    def run(self) -> None:
        from dit_accel import demo

        # Recipe of each model, and the prefix of its options.
        recipes: dict[str, tuple[Recipe, str]] = {
            "tiny-wan": (TrainConfig(**asdict(self.recipe)), "no prefix"),
            "tiny-sd3": (ImageTrainConfig(**asdict(self.image)), "the prefix image"),
            "tiny-lumina2": (Lumina2TrainConfig(**asdict(self.lumina2)), "the prefix lumina2"),
        }
        config, prefix = recipes.pop(self.model)
        if any(other != type(other)() for other, _ in recipes.values()):
            raise ValueError(f"model={self.model!r}: only takes recipe options with {prefix}")
        print_json(demo.train(self.output_dir, self.work_dir, config, self.device))


@dataclass(kw_only=True)
class Judge:
    """Generate clips or stills with a demo model, and judge them: shape, colour, motion or background."""

    output: Path
    """Report to write, a JSON file."""
    model: str = EMBEDDED
    """tiny-wan, tiny-sd3, tiny-lumina2, or a repository: hub id or folder."""
    sla: str = "none"
    """Sparse attention, as in generate."""
    crossover: Literal["auto", "never"] | None = None
    num_clips: int = 288
    """Clips of combinations seen in training."""
    num_heldout: int = 96
    """Clips of combinations that training never showed."""
    seed: int = 0
    batch_size: int = 8
    num_inference_steps: int | None = None
    """Default: 12 for clips, 20 for stills."""
    guidance_scale: float | None = None
    """Default: 2."""
    device: str = "auto"

    def run(self) -> None:
        from dit_accel import demo

        sampling = SamplingOptions(
            num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale
        )
        options = AccelerationOptions(
            model=self.model,
            sampling=sampling,
            seed=self.seed,
            output_dir=self.output.parent,
            sla=self.sla,
            crossover=self.crossover,
            device=self.device,
        )
        demo.check_judged(self.num_clips, self.num_heldout, self.batch_size)
        settings = options.sla_config()
        outline, _ = options.check(samples=self.num_clips + self.num_heldout)
        defaults = {"max_sequence_length": 512} | demo.default_sampling(outline)
        pipe = options.load(settings)
        pipe.set_progress_bar_config(disable=True)
        report = demo.judge_pipeline(
            pipe,
            Sampling(**asdict(sampling)).filled(defaults),
            num_clips=self.num_clips,
            num_heldout=self.num_heldout,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        self.output.parent.mkdir(parents=True, exist_ok=True)
        head = {"format_version": report.pop("format_version"), "model": Path(self.model).name}
        write_json(self.output, head | report)
        for split, labels in report["summary"].items():
            for name, x in labels.items():
                low, high = x["interval_95"]
                if x["count"]:
                    rate = f"{x['rate']:.3f}  [{low:.3f}, {high:.3f}]  of {x['count']}"
                    print_line(f"{split:8} {name:10} {rate}")
