"""`dit-accel`: one sub-command a job. Parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed while running,
2 bad input (nothing was written) or a --fail_if that cannot be decided, 3 a --fail_if condition
holds, 130 interrupted.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from dit_accel.cli.checkpoints import Convert, Merge
from dit_accel.cli.evaluation import Eval
from dit_accel.cli.options import (
    EMBEDDED,
    EMBEDDED_IMAGE,
    AccelerationOptions,
    FailIf,
    fail_on,
    print_json,
    print_line,
)
from dit_accel.demo import ImageTrainConfig, TrainConfig
from dit_accel.sampling.prompts import number_prompts, read_prompts


@dataclass(kw_only=True)
class Generate(AccelerationOptions):
    """Generate clips or images, accelerated; each gets a sidecar JSON."""

    prompt: Positional[str | None] = None
    """What to show. Leave it out with --prompts-file."""
    prompts_file: Path | None = None
    """.txt with a prompt a line, or .jsonl, .csv, .tsv with prompt and, where wanted, negative_prompt, seed,
    height, width, num_frames."""
    kind: Literal["auto", "mp4", "gif", "png"] = "auto"
    """auto: mp4 for clips, png for images."""
    save_focus: bool = False
    """Also write where region-adaptive sampling worked: a heat map and the masks of its steps. Nothing
    is written for a run of dense steps only."""

    def run(self) -> None:
        from dit_accel.sampling.numbered import generate_numbered

        if self.prompt is not None and self.prompts_file is None:
            prompts = number_prompts([self.prompt])
        elif self.prompts_file is not None and self.prompt is None:
            prompts = read_prompts(self.prompts_file)
        else:
            raise ValueError("prompt, prompts_file: give one of the two")
        if self.save_focus and self.ras == "none":
            raise ValueError("save_focus: accepted with --ras, which is none")
        pipe, sampling = self.load(self.sla_config(), self.ras_config())
        records = generate_numbered(
            pipe,
            prompts,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            seed=self.seed,
            kind=self.kind,
            fps=self.fps,
            save_focus=self.save_focus,
        )
        if self.format == "json":
            print_json(records)
            return
        for record in records:
            seconds, spared = record["seconds"], record["acceleration"]
            what = [] if spared["density"] is None else [f"density {spared['density']:.2f}"]
            if ras := spared["ras"]:
                what.append(f"cost of {ras['cost']:.1f} of {len(ras['steps'])} steps")
            files = "  ".join(record["files"])
            print_line(
                f"{files}  {', '.join(what) or 'dense'}  denoise {seconds['denoise']:.1f} s  {record['prompt']}"
            )
        print_line(str(pipe.summary()))


@dataclass(kw_only=True)
class Compare(AccelerationOptions):
    """Same seed dense and accelerated: side-by-side clip, contact sheet, PSNR, SSIM, seconds, density."""

    prompt: Positional[str]
    repeats: int = 1
    """Measured runs of each kind; the median counts."""
    methods: tuple[str, ...] = ()
    """What else to run, as in `eval run`: fewer_steps (dense sampling in the time of the others),
    first_block_cache, sea_cache, ras, sla, ras_sla, with a setting after a colon."""
    fail_if: FailIf = ()
    """Exit with 3 if this holds, as in "psnr<25" or "speedup_total<1.5"; may be given several times."""
    overwrite: bool = False
    """Replace an earlier comparison in the folder."""

    def run(self) -> None:
        from dit_accel.eval.runs.compare import COMPARED, as_results, compare
        from dit_accel.eval.view.conditions import check, check_early

        check_early(self.fail_if, metrics=COMPARED)
        sla, ras = self.sla_config(), self.ras_config()
        if sla is None and ras is None:
            raise ValueError("sla='none': nothing to compare; accepted are a preset or a YAML file")
        pipe, sampling = self.load()
        result = compare(
            pipe,
            self.prompt,
            sla=sla,
            ras=ras,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            seed=self.seed,
            repeats=self.repeats,
            methods=self.methods,
            crossover=self.crossover,
            fps=self.fps,
            overwrite=self.overwrite,
        )
        print_json(result) if self.format == "json" else _print_comparison(result)
        fail_on(check(as_results(result), self.fail_if))


@dataclass(kw_only=True)
class Env:
    """Versions and hardware, for bug reports."""

    format: Literal["human", "json"] = "human"

    def run(self) -> None:
        from dit_accel.environment import machine, versions

        facts = {**versions(), **machine()}
        if self.format == "json":
            print_json(facts)
            return
        for key, value in facts.items():
            print_line(f"{key:14} {value}")


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

        print_line(str(demo.make_data(**vars(self))))


@dataclass(kw_only=True)
class Train:
    """Train a demo model from nothing; started again, it resumes."""

    output_dir: Path
    """Where the diffusers repository goes; must not exist yet."""
    model: Literal["tiny-wan", "tiny-sd3"] = "tiny-wan"
    """tiny-wan makes clips, tiny-sd3 stills."""
    work_dir: Path | None = None
    """Checkpoints. Default: the output folder's name with "-work"."""
    recipe: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    image: ImageTrainConfig = field(default_factory=ImageTrainConfig)
    """The recipe of tiny-sd3; the options without a prefix are that of tiny-wan."""
    device: str = "auto"

    def run(self) -> None:
        from dit_accel import demo

        still = self.model == EMBEDDED_IMAGE
        if still and self.recipe != TrainConfig():
            raise ValueError(
                f"model={self.model!r}: accepted are recipe options that begin with image"
            )
        if not still and self.image != ImageTrainConfig():
            raise ValueError(f"model={self.model!r}: accepted are recipe options without image")
        if still:
            record = demo.train_image(self.output_dir, self.work_dir, self.image, self.device)
        else:
            record = demo.train(self.output_dir, self.work_dir, self.recipe, self.device)
        print_json(record)


@dataclass(kw_only=True)
class Judge:
    """Generate clips or stills with a demo model (or one like it) and judge them: shape, colour, motion
    or background."""

    output: Path
    """The report, a JSON file."""
    model: str = EMBEDDED
    """tiny-wan, tiny-sd3, or a repository: hub id or folder."""
    sla: str = "none"
    """As in generate."""
    crossover: Literal["auto", "never"] | None = None
    num_clips: int = 288
    """Of combinations seen in training."""
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
        from dit_accel.files import check_writable

        check_writable(self.output.parent, "output")
        common = AccelerationOptions(
            model=self.model, sla=self.sla, crossover=self.crossover, device=self.device
        )
        common.output_dir = self.output.parent
        pipe, _ = common.load(common.sla_config())
        pipe.set_progress_bar_config(disable=True)
        still = not hasattr(pipe, "vae_scale_factor_temporal")
        sampling = demo.IMAGE_SAMPLING | {"num_frames": None} if still else demo.SAMPLING
        given = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        report = demo.judge_pipeline(
            pipe,
            num_clips=self.num_clips,
            num_heldout=self.num_heldout,
            seed=self.seed,
            batch_size=self.batch_size,
            **sampling | {k: v for k, v in given.items() if v is not None},
        )
        demo.write_report(report, self.output, Path(self.model).name)
        for split, metrics in report["summary"].items():
            for name, x in metrics.items():
                low, high = x["interval_95"]
                if x["count"]:
                    print_line(
                        f"{split:8} {name:10} {x['rate']:.3f}  [{low:.3f}, {high:.3f}]  of {x['count']}"
                    )


@dataclass(kw_only=True)
class Demo:
    """The procedural data set, the tiny model trained on it, and its judge."""

    command: (
        Annotated[MakeData, subcommand("make-data")]
        | Annotated[Train, subcommand("train")]
        | Annotated[Judge, subcommand("judge")]
    )

    def run(self) -> None:
        self.command.run()


def _print_comparison(result: dict[str, Any]) -> None:
    from dit_accel.eval.runs.compare import as_results
    from dit_accel.eval.view.terminal import results_lines

    print_line("\n".join(results_lines(as_results(result), parts=True)))
    density = result["density"]
    shown = "no sparse call" if density is None else f"{density:.3f}"
    print_line(f"\ndensity of sparse calls: {shown}")
    for reason, n in result["acceleration"]["dense_calls"].items():
        print_line(f"  {n} calls dense: {reason}")
    for name in result["files"]:
        print_line(str(Path(result["output_dir"]) / name))


Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Merge, subcommand("merge")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Env, subcommand("env")]
    | Annotated[Demo, subcommand("demo")]
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command: Any = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="dit-accel",
        description=__doc__,
        args=argv,
        config=(OmitSubcommandPrefixes,),
    )
    try:
        command.run()
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RuntimeError, OSError, ImportError) as error:
        sys.stderr.write(f"failed: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
