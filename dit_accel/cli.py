"""`dit-accel`: one sub-command a job. Parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed while running,
2 bad input (nothing was written), 130 interrupted.
"""

import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from dit_accel.config import SLAConfig
from dit_accel.demo import TrainConfig
from dit_accel.pipelines.generate import Prompt, Sampling

EMBEDDED = "tiny-wan"


@dataclass(kw_only=True)
class _Common:
    """Options that generate and compare share."""

    model: str = EMBEDDED
    """Wan2.1 repository: hub id or folder; "tiny-wan" is the embedded demo model."""
    sla: str = "balanced"
    """Sparse attention: quality, balanced, fast, a YAML file, or none."""
    topk: float | None = None
    """Overrides the share of key blocks that is read exactly, in (0, 1]."""
    crossover: Literal["auto", "never"] | None = None
    """Overrides crossover: auto = dense where sparse was measured to lose, never = always sparse."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    seed: int = 0
    output_dir: Path = Path("outputs")
    fps: float = 16.0
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    cpu_offload: bool = False
    """Keep on the GPU only the part that works (enable_model_cpu_offload)."""
    format: Literal["human", "json"] = "human"
    """How the result is printed on stdout."""

    def sla_config(self) -> SLAConfig | None:
        """The settings, overrides applied; None for dense."""
        if self.sla == "none":
            if self.topk is not None or self.crossover is not None:
                raise ValueError("sla='none': dense; accepted without topk and crossover")
            return None
        config = SLAConfig.load(self.sla)
        return replace(
            config,
            topk=config.topk if self.topk is None else self.topk,
            crossover=self.crossover or config.crossover,
        )

    def resolve(self) -> tuple[str | Path, Sampling]:
        """Where the model lies, and the sampling arguments with its defaults."""
        if self.model != EMBEDDED:
            return self.model, self.sampling
        from dit_accel import demo
        from dit_accel.files import asset

        return asset(EMBEDDED), self.sampling.filled(demo.SAMPLING)

    def load(self, sla: SLAConfig | None) -> tuple[Any, Sampling]:
        """The pipeline, ready to run, and its sampling arguments."""
        from dit_accel.files import check_writable
        from dit_accel.pipelines import generate

        check_writable(self.output_dir, "output_dir")
        source, sampling = self.resolve()
        hub = {} if self.revision is None else {"revision": self.revision}
        where = "cpu" if self.cpu_offload else self.device
        pipe = generate.load(source, sla=sla, device=where, dtype=self.dtype, **hub)
        if self.cpu_offload:
            pipe.enable_model_cpu_offload(device=generate.resolved_device(self.device))
        pipe.check_sizes(**sampling.call_arguments())
        return pipe, sampling


@dataclass(kw_only=True)
class Generate(_Common):
    """Generate clips with sparse attention; each gets a sidecar JSON."""

    prompt: Positional[str | None] = None
    """What to show. Leave it out with --prompts-file."""
    prompts_file: Path | None = None
    """.txt with a prompt a line, or .jsonl with prompt, negative_prompt, seed."""
    kind: Literal["mp4", "gif", "png"] = "mp4"

    def run(self) -> None:
        from dit_accel.pipelines import generate

        if self.prompt is not None and self.prompts_file is None:
            prompts = [Prompt(self.prompt)]
        elif self.prompts_file is not None and self.prompt is None:
            prompts = generate.read_prompts(self.prompts_file)
        else:
            raise ValueError("prompt, prompts_file: give one of the two")
        pipe, sampling = self.load(self.sla_config())
        records = generate.generate(
            pipe,
            prompts,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            seed=self.seed,
            kind=self.kind,
            fps=self.fps,
        )
        if self.format == "json":
            _print_json(records)
            return
        for record in records:
            seconds, sparse = record["seconds"], record["acceleration"]
            density = "dense" if sparse["density"] is None else f"density {sparse['density']:.2f}"
            _print(
                f"{record['files'][0]}  {density}  denoise {seconds['denoise']:.1f} s  {record['prompt']}"
            )
        _print(str(pipe.summary()))


@dataclass(kw_only=True)
class Compare(_Common):
    """Same seed dense and sparse: side-by-side clip, contact sheet, PSNR, SSIM, seconds, density."""

    prompt: Positional[str]
    repeats: int = 1
    """Measured runs of each kind; the median counts."""
    overwrite: bool = False
    """Replace an earlier comparison in the folder."""

    def run(self) -> None:
        from dit_accel.eval.compare import compare

        sla = self.sla_config()
        if sla is None:
            raise ValueError("sla='none': nothing to compare; accepted are a preset or a YAML file")
        pipe, sampling = self.load(None)
        result = compare(
            pipe,
            self.prompt,
            sla=sla,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            seed=self.seed,
            repeats=self.repeats,
            fps=self.fps,
            overwrite=self.overwrite,
        )
        _print_json(result) if self.format == "json" else _print_comparison(result)


@dataclass(kw_only=True)
class Env:
    """Versions and hardware, for bug reports."""

    format: Literal["human", "json"] = "human"

    def run(self) -> None:
        from dit_accel.environment import machine, versions

        facts = {**versions(), **machine()}
        if self.format == "json":
            _print_json(facts)
            return
        for key, value in facts.items():
            _print(f"{key:14} {value}")


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

        _print(str(demo.make_data(**vars(self))))


@dataclass(kw_only=True)
class Train:
    """Train the demo model from nothing; started again, it resumes."""

    output_dir: Path
    """Where the diffusers repository goes; must not exist yet."""
    work_dir: Path | None = None
    """Checkpoints. Default: the output folder's name with "-work"."""
    recipe: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    device: str = "auto"

    def run(self) -> None:
        from dit_accel import demo

        record = demo.train(self.output_dir, self.work_dir, self.recipe, device=self.device)
        _print_json(record)


@dataclass(kw_only=True)
class Judge:
    """Generate clips with the demo model (or one like it) and judge them: shape, colour, motion."""

    output: Path
    """The report, a JSON file."""
    model: str = EMBEDDED
    sla: str = "none"
    """As in generate."""
    crossover: Literal["auto", "never"] | None = None
    num_clips: int = 288
    """Of combinations seen in training."""
    num_heldout: int = 96
    seed: int = 0
    batch_size: int = 8
    num_inference_steps: int = 12
    guidance_scale: float = 2.0
    device: str = "auto"

    def run(self) -> None:
        from dit_accel import demo
        from dit_accel.files import check_writable

        check_writable(self.output.parent, "output")
        common = _Common(
            model=self.model, sla=self.sla, crossover=self.crossover, device=self.device
        )
        common.output_dir = self.output.parent
        pipe, _ = common.load(common.sla_config())
        pipe.set_progress_bar_config(disable=True)
        report = demo.judge_pipeline(
            pipe,
            num_clips=self.num_clips,
            num_heldout=self.num_heldout,
            seed=self.seed,
            batch_size=self.batch_size,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        demo.write_report(report, self.output, Path(self.model).name)
        for split, metrics in report["summary"].items():
            for name, x in metrics.items():
                low, high = x["interval_95"]
                if x["count"]:
                    _print(
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


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print_json(data: Any) -> None:
    _print(json.dumps(data, indent=2, ensure_ascii=False))


def _print_comparison(result: dict[str, Any]) -> None:
    dense, sparse = result["seconds"]["dense"], result["seconds"]["sparse"]

    def number(value: float | None, digits: int, missing: str) -> str:
        return missing if value is None else f"{value:.{digits}f}"

    rows = [
        ("", "dense", "sparse"),
        ("denoise, s", f"{dense['denoise']:.2f}", f"{sparse['denoise']:.2f}"),
        ("text + decode, s", *(f"{x['text'] + x['decode']:.2f}" for x in (dense, sparse))),
        ("total, s", f"{dense['total']:.2f}", f"{sparse['total']:.2f}"),
        ("density of sparse calls", "1", number(result["density"], 3, "no sparse call")),
        ("density of all self-attention", "1", number(result["overall_density"], 3, "1")),
        ("speed-up of denoising", "", f"{result['speedup_denoise']:.2f}x"),
        ("PSNR to dense, dB", "", number(result["psnr_db"], 2, "identical")),
        ("SSIM to dense", "", f"{result['ssim']:.4f}"),
    ]
    for name, a, b in rows:
        _print(f"{name:31}{a:>10}{b:>16}")
    for reason, n in result["acceleration"]["dense_calls"].items():
        _print(f"  {n} calls dense: {reason}")
    for name in result["files"]:
        _print(str(Path(result["output_dir"]) / name))


Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Compare, subcommand("compare")]
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
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"failed: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
