"""`dit-accel demo`: make-data, train, judge."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from dit_accel.cli.options import (
    EMBEDDED,
    AccelerationOptions,
    SamplingOptions,
)
from dit_accel.cli.printing import print_json, print_line
from dit_accel.demo.config import (
    ImageRecipe,
    ImageTrainConfig,
    Lumina2TrainConfig,
    Recipe,
    TrainConfig,
)
from dit_accel.sampling.settings import Sampling


@dataclass(frozen=True)
class ClipRecipe(TrainConfig):
    """`TrainConfig` as parsed; it is checked when the command runs."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class StillRecipe(ImageTrainConfig):
    """`ImageTrainConfig` as parsed; it is checked when the command runs."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Lumina2Recipe(Lumina2TrainConfig):
    """`Lumina2TrainConfig` as parsed; it is checked when the command runs."""

    def __post_init__(self) -> None:
        pass


@dataclass(kw_only=True)
class MakeData:
    """Write captioned clips of moving shapes: mp4 files and captions.jsonl."""

    output_dir: Path
    """Must not exist yet, or be empty."""
    num_clips: int = 256
    split: Literal["train", "heldout", "all"] = "train"
    seed: int = 0
    num_frames: int = 33
    height: int = 64
    width: int = 64
    fps: int = 16

    def run(self) -> None:
        from dit_accel import demo
        from dit_accel.sampling.settings import check_fps, check_seed

        check_fps(self.fps)
        check_seed(self.seed, max(1, self.num_clips))
        print_line(str(demo.make_data(**vars(self))))


@dataclass(kw_only=True)
class Train:
    """Train a demo model from nothing; started again, it resumes."""

    output_dir: Path
    """Folder of the diffusers repository to write; must not exist yet."""
    model: Literal["tiny-wan", "tiny-sd3", "tiny-lumina2"] = "tiny-wan"
    """tiny-wan makes clips, tiny-sd3 and tiny-lumina2 make stills."""
    work_dir: Path | None = None
    """Checkpoints. Default: the output folder's name with "-work"."""
    recipe: OmitArgPrefixes[ClipRecipe] = field(default_factory=ClipRecipe)
    image: StillRecipe = field(default_factory=StillRecipe)
    """The recipe of tiny-sd3; the options without a prefix are that of tiny-wan."""
    lumina2: Lumina2Recipe = field(default_factory=Lumina2Recipe)
    """The recipe of tiny-lumina2."""
    device: str = "auto"

    def run(self) -> None:
        from dit_accel import demo
        from dit_accel.sampling.devices import pick_device

        # Recipe of each model, and the prefix of its options.
        recipes: dict[str, tuple[Recipe, str]] = {
            "tiny-wan": (TrainConfig(**asdict(self.recipe)), "no prefix"),
            "tiny-sd3": (ImageTrainConfig(**asdict(self.image)), "the prefix image"),
            "tiny-lumina2": (Lumina2TrainConfig(**asdict(self.lumina2)), "the prefix lumina2"),
        }
        config, prefix = recipes.pop(self.model)
        if any(other != type(other)() for other, _ in recipes.values()):
            raise ValueError(f"model={self.model!r}: accepted are recipe options with {prefix}")
        pick_device(self.device)
        if isinstance(config, TrainConfig):
            record = demo.train(self.output_dir, self.work_dir, config, self.device)
        else:
            assert isinstance(config, ImageRecipe)
            record = demo.train_image(self.output_dir, self.work_dir, config, self.device)
        print_json(record)


@dataclass(kw_only=True)
class Judge:
    """Generate clips or stills with a demo model (or one like it) and judge them: shape, colour, motion
    or background."""

    output: Path
    """The report, a JSON file."""
    model: str = EMBEDDED
    """tiny-wan, tiny-sd3, tiny-lumina2, or a repository: hub id or folder."""
    sla: str = "none"
    """Sparse attention, as in generate."""
    crossover: Literal["auto", "never"] | None = None
    num_clips: int = 288
    """Clips of combinations seen in training."""
    num_heldout: int = 96
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
        given = Sampling(**asdict(sampling)).call_arguments()
        pipe = options.load(settings)
        pipe.set_progress_bar_config(disable=True)
        defaults = {"num_frames": None} | demo.default_sampling(outline)
        report = demo.judge_pipeline(
            pipe,
            num_clips=self.num_clips,
            num_heldout=self.num_heldout,
            seed=self.seed,
            batch_size=self.batch_size,
            **defaults | given,
        )
        self.output.parent.mkdir(parents=True, exist_ok=True)
        demo.write_report(report, self.output, Path(self.model).name)
        for split, metrics in report["summary"].items():
            for name, x in metrics.items():
                low, high = x["interval_95"]
                if x["count"]:
                    print_line(
                        f"{split:8} {name:10} {x['rate']:.3f}  [{low:.3f}, {high:.3f}]  of {x['count']}"
                    )
