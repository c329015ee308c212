"""`dit-accel`: one sub-command a job. Parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed while running,
2 bad input (nothing was written), 130 interrupted.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from dit_accel.cli_adapters import Convert, Merge, sla_settings
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.demo import ImageTrainConfig, TrainConfig
from dit_accel.pipelines.generate import Sampling
from dit_accel.prompts import number_prompts, read_prompts
from dit_accel.sla.files import Adapter

EMBEDDED = "tiny-wan"
EMBEDDED_IMAGE = "tiny-sd3"


@dataclass(kw_only=True)
class _Common:
    """Options that generate and compare share."""

    model: str = EMBEDDED
    """Repository of Wan2.1, Stable Diffusion 3, Lumina-Next or Lumina-Image 2.0: hub id or folder;
    "tiny-wan" and "tiny-sd3" are the embedded demo models."""
    sla: str = "auto"
    """Sparse attention: quality, balanced, fast, a YAML file, a folder with sla.safetensors, or none;
    auto is the model's own sla.safetensors, and balanced without one."""
    ras: str = "none"
    """Region-adaptive sampling: quality, balanced, fast, paper, a YAML file, or none."""
    topk: float | None = None
    """Overrides the share of key blocks that is read exactly, in (0, 1]; not with sla.safetensors."""
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

    def sla_config(self) -> SLAConfig | Adapter | None:
        """The settings, overrides applied; None for dense."""
        source, _ = self.resolve()
        return sla_settings(self.sla, source, self.hub, topk=self.topk, crossover=self.crossover)

    def ras_config(self) -> RASConfig | None:
        """The settings; None for all tokens in each step."""
        return None if self.ras == "none" else RASConfig.load(self.ras)

    def resolve(self) -> tuple[str | Path, Sampling]:
        """Where the model lies, and the sampling arguments with its defaults."""
        if self.model not in (EMBEDDED, EMBEDDED_IMAGE):
            return self.model, self.sampling
        from dit_accel import demo
        from dit_accel.files import asset

        defaults = demo.SAMPLING if self.model == EMBEDDED else demo.IMAGE_SAMPLING
        return asset(self.model), self.sampling.filled(defaults)

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments for the hub."""
        return {} if self.revision is None else {"revision": self.revision}

    def load(
        self, sla: SLAConfig | Adapter | None, ras: RASConfig | None = None
    ) -> tuple[Any, Sampling]:
        """The pipeline, ready to run, and its sampling arguments."""
        from dit_accel.files import check_writable
        from dit_accel.pipelines import generate

        check_writable(self.output_dir, "output_dir")
        source, sampling = self.resolve()
        where = "cpu" if self.cpu_offload else self.device
        pipe = generate.load(source, sla=sla, ras=ras, device=where, dtype=self.dtype, **self.hub)
        if self.cpu_offload:
            pipe.enable_model_cpu_offload(device=generate.resolved_device(self.device))
        pipe.check_sizes(**sampling.call_arguments())
        return pipe, sampling


@dataclass(kw_only=True)
class Generate(_Common):
    """Generate clips or images, accelerated; each gets a sidecar JSON."""

    prompt: Positional[str | None] = None
    """What to show. Leave it out with --prompts-file."""
    prompts_file: Path | None = None
    """.txt with a prompt a line, or .jsonl with prompt, negative_prompt, seed."""
    kind: Literal["auto", "mp4", "gif", "png"] = "auto"
    """auto: mp4 for clips, png for images."""
    save_focus: bool = False
    """Also write where region-adaptive sampling worked: a heat map and the masks of its steps. Nothing
    is written for a run of dense steps only."""

    def run(self) -> None:
        from dit_accel.pipelines import generate

        if self.prompt is not None and self.prompts_file is None:
            prompts = number_prompts([self.prompt])
        elif self.prompts_file is not None and self.prompt is None:
            prompts = read_prompts(self.prompts_file)
        else:
            raise ValueError("prompt, prompts_file: give one of the two")
        if self.save_focus and self.ras == "none":
            raise ValueError("save_focus: accepted with --ras, which is none")
        pipe, sampling = self.load(self.sla_config(), self.ras_config())
        records = generate.generate(
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
            _print_json(records)
            return
        for record in records:
            seconds, spared = record["seconds"], record["acceleration"]
            what = [] if spared["density"] is None else [f"density {spared['density']:.2f}"]
            if ras := spared["ras"]:
                what.append(f"cost of {ras['cost']:.1f} of {len(ras['steps'])} steps")
            files = "  ".join(record["files"])
            _print(
                f"{files}  {', '.join(what) or 'dense'}  denoise {seconds['denoise']:.1f} s  {record['prompt']}"
            )
        _print(str(pipe.summary()))


@dataclass(kw_only=True)
class Compare(_Common):
    """Same seed dense and accelerated: side-by-side clip, contact sheet, PSNR, SSIM, seconds, density."""

    prompt: Positional[str]
    repeats: int = 1
    """Measured runs of each kind; the median counts."""
    overwrite: bool = False
    """Replace an earlier comparison in the folder."""

    def run(self) -> None:
        from dit_accel.eval.compare import compare

        sla, ras = self.sla_config(), self.ras_config()
        if sla is None and ras is None:
            raise ValueError("sla='none': nothing to compare; accepted are a preset or a YAML file")
        pipe, sampling = self.load(None)
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
        _print_json(record)


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
        common = _Common(
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
        ("", "dense", "accelerated"),
        ("denoise, s", f"{dense['denoise']:.2f}", f"{sparse['denoise']:.2f}"),
        ("text + decode, s", *(f"{x['text'] + x['decode']:.2f}" for x in (dense, sparse))),
        ("total, s", f"{dense['total']:.2f}", f"{sparse['total']:.2f}"),
        ("density of sparse calls", "1", number(result["density"], 3, "no sparse call")),
        ("density of all self-attention", "1", number(result["overall_density"], 3, "1")),
        *_ras_rows(result["acceleration"]["ras"]),
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


def _ras_rows(ras: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    if ras is None:
        return []
    return [("cost in dense steps", str(len(ras["steps"])), f"{ras['cost']:.2f}")]


Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Compare, subcommand("compare")]
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
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"failed: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
