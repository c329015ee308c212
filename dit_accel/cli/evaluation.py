"""`dit-accel eval`: generate, score, report, run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.cli.checkpoints import sla_settings
from dit_accel.cli.options import (
    AccelerationOptions,
    FailIf,
    ModelOptions,
    fail_on,
    print_json,
    print_line,
)
from dit_accel.eval.metrics.networks import Networks
from dit_accel.eval.results.types import Results
from dit_accel.sampling.settings import Sampling


@dataclass(kw_only=True)
class Generate(AccelerationOptions):
    """Prompts to a sample set; started again after a kill, it goes on. Under torchrun each process makes its
    share: torchrun --nproc-per-node 2 -m dit_accel.cli eval generate ...

    Exit codes: 0 done, 1 failed while running (what is finished stays), 2 bad input, 130 interrupted.
    """

    prompts: str = "smoke"
    """A file (.txt, .jsonl, .csv, .tsv), or a shipped set: smoke, demo, demo-images."""
    limit: int | None = None
    """Only so many prompts."""
    sla: str = "none"
    """Sparse attention: none, auto, quality, balanced, fast, a YAML file, or a folder with
    sla.safetensors."""
    cache: str = "none"
    """A step cache of diffusers: none, first_block_cache, sea_cache; with a threshold after a colon."""
    batch_size: int = 1
    """Samples a pipeline call."""
    samples_per_prompt: int | None = None
    """Default: 1; for VBench 5."""
    layout: Literal["ids", "vbench"] = "ids"
    """vbench also puts the clips where VBench looks for them."""
    overwrite: bool = False
    """Replace samples that were made with other settings."""

    def run(self) -> None:
        from dit_accel.eval.runs.methods import CACHES, read_methods
        from dit_accel.sampling.generate import generate
        from dit_accel.sampling.prompt_sets import load_prompts

        prompts = load_prompts(self.prompts, self.limit)
        sla, ras = self.sla_config(), self.ras_config()
        if self.cache != "none" and self.cache.partition(":")[0] not in CACHES:
            raise ValueError(f"cache={self.cache!r}: accepted are none, {', '.join(CACHES)}")
        pipe, sampling = self.load()
        cache = None
        if self.cache != "none":
            [_, method] = read_methods([self.cache], pipe)
            if method.why is not None:
                raise ValueError(f"cache={self.cache!r}: {method.why}")
            cache = method.cache
        made = generate(
            pipe,
            prompts,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            revision=self.revision,
            seed=self.seed,
            batch_size=self.batch_size,
            samples_per_prompt=self.samples_per_prompt,
            fps=self.fps,
            layout=self.layout,
            sla=sla,
            ras=ras,
            cache=cache,
            overwrite=self.overwrite,
            warm_up=True,
        )
        if self.format == "json":
            done = {} if made is None else {"kind": made.kind, "samples": len(made)}
            print_json({"output_dir": str(self.output_dir), "complete": made is not None, **done})
        elif made is None:
            print_line(f"{self.output_dir}: this process has finished; others have not")
        else:
            print_line(f"{self.output_dir}: {len(made)} {made.kind}")


@dataclass(kw_only=True)
class Score:
    """Metrics of a folder of images or clips, with intervals, counts and the networks behind them.

    Exit codes: 0 done, 1 failed while running, 2 bad input or a --fail_if that cannot be decided, 3 a
    --fail_if condition holds, 130 interrupted.
    """

    images: Positional[Path | None] = None
    """A sample set, or any folder of pictures; clips are folders of frames. Not with --parts."""
    reference: Path | None = None
    """What it is compared with: a folder, or a measurement that --save wrote."""
    metrics: tuple[str, ...] = ()
    """Such as psnr ssim fid clip_score; default: all that the other options allow."""
    prompts: str | None = None
    """A prompts file or shipped set whose ids are the samples'; default: what the set says."""
    networks: OmitArgPrefixes[Networks] = field(default_factory=Networks)
    allow_partial: bool = False
    """Compare the ids that both sets have."""
    batch_size: int = 32
    """Pictures a network sees at once."""
    workers: int = 2
    """Threads that read ahead."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    shard: str = "0/1"
    """i/n: measure every n-th sample from the i-th on, for --save; --parts puts the n together."""
    save: Path | None = None
    """Keep the measurement as .safetensors: a reference for later, or a part."""
    parts: tuple[Path, ...] = ()
    """Measurements of all shards, instead of images."""
    output: Path | None = None
    """The figures as JSON."""
    fail_if: FailIf = ()
    """Exit with 3 if this holds, as in "fid>30"; may be given several times."""
    format: Literal["human", "json"] = "human"
    """How the result is printed on stdout."""

    def run(self) -> None:
        from dit_accel.environment import machine, versions
        from dit_accel.eval.metrics.judge import PARTS
        from dit_accel.eval.metrics.measurement import Measurement
        from dit_accel.eval.view.conditions import check_early, check_figures
        from dit_accel.files import check_writable, write_json

        if (self.images is None) == (not self.parts):
            raise ValueError("images, parts: give one of the two")
        if self.parts:
            usual = Networks().arguments()
            chosen = {k: x for k, x in self.networks.arguments().items() if x != usual[k]}
            chosen |= {
                "reference": self.reference,
                "metrics": self.metrics,
                "prompts": self.prompts,
            }
            for name, value in chosen.items():
                if value:
                    raise ValueError(
                        f"{name}={str(value)!r}: accepted when the parts are measured, not beside parts"
                    )
        shard = self._shard()
        if shard[1] > 1 and (self.save is None or self.fail_if or self.output is not None):
            raise ValueError(
                f"shard={self.shard!r}: a part has no figures; accepted with save, without output and fail_if"
            )
        if self.save is not None and self.save.suffix != ".safetensors":
            raise ValueError(f"save={str(self.save)!r}: accepted is a .safetensors file")
        judged = [f"judge_{x}" for x in PARTS[1:]] if "judge" in self.metrics else []
        check_early(self.fail_if, metrics=[*self.metrics, *judged] if self.metrics else None)
        for name, path in (("save", self.save), ("output", self.output)):
            if path is not None:
                check_writable(path.parent, name)
        if self.parts:
            measurement, *others = [Measurement.load(x) for x in self.parts]
            for part in others:
                measurement.merge(part)
        else:
            measurement = self._measure(shard)
        if self.save is not None:
            measurement.save(self.save)
        if shard[1] > 1:
            print_line(str(self.save))
            return
        if measurement.comparisons and "reference" not in measurement.features:
            if self.save is None or self.fail_if or self.output is not None:
                names = ", ".join(measurement.comparisons)
                raise ValueError(
                    f"reference: none, so {names} have no value; accepted with save alone"
                )
            print_line(str(self.save))
            return
        figures = measurement.figures()
        record = {"format_version": 1, "versions": versions(), "machine": machine()}
        record |= {"images": str(self.images), "reference": str(self.reference), "figures": figures}
        if self.output is not None:
            write_json(self.output, record)
        if self.format == "json":
            print_json(record)
        else:
            from dit_accel.eval.view.terminal import figures_lines

            print_line("\n".join(figures_lines(figures)))
        fail_on(check_figures(figures, self.fail_if))

    def _shard(self) -> tuple[int, int]:
        index, _, count = self.shard.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"shard={self.shard!r}: accepted is i/n with 0 <= i < n")
        return int(index), int(count)

    def _measure(self, shard: tuple[int, int]) -> Any:
        from dit_accel.eval.metrics.score import measure

        assert self.images is not None
        return measure(
            self.images,
            reference=self.reference,
            prompts=self.prompts,
            metrics=self.metrics or None,
            allow_partial=self.allow_partial,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            shard=shard,
            need_reference=self.save is None,
            **self.networks.arguments(),
        )


@dataclass(kw_only=True)
class Report:
    """Table, picture and page anew from the results.json of a folder.

    Exit codes: 0 done, 1 failed while running, 2 bad input or a --fail_if that cannot be decided, 3 a
    --fail_if condition holds, 130 interrupted.
    """

    folder: Positional[Path]
    """Holds results.json and the samples that it names."""
    title: str | None = None
    """Default: that of the results."""
    shown: int = 8
    """Samples in page and picture."""
    overwrite: bool = True
    """Replace an earlier report."""
    fail_if: FailIf = ()
    """Exit with 3 if this holds, as in "psnr<25" or "SLA balanced: seconds_total>4"; may be given several
    times."""
    format: Literal["human", "json"] = "human"
    """How the result is printed on stdout."""

    def run(self) -> None:
        from dit_accel.eval.results.store import read_results
        from dit_accel.eval.view.conditions import check
        from dit_accel.eval.view.report import report

        reasons = check(read_results(self.folder), self.fail_if)
        written = report(
            self.folder, title=self.title, samples=self.shown, overwrite=self.overwrite
        )
        results = read_results(self.folder)
        _print_results({str(self.folder): results}, self.format)
        if self.format == "human":
            for path in written.values():
                print_line(str(path))
        fail_on(reasons)


@dataclass(kw_only=True)
class Run(ModelOptions):
    """Dense sampling, dense sampling with fewer steps at equal time, step caches, RAS and SLA in one table
    and one page. Started again after a kill, it goes on.

    Exit codes: 0 done, 1 failed while running (what is finished stays), 2 bad input or a --fail_if that
    cannot be decided, 3 a --fail_if condition holds, 130 interrupted.
    """

    preset: Literal["none", "demo"] = "none"
    """demo: both embedded models, each in a sub-folder with a page of its own; some minutes on two cores."""
    prompts: str = "smoke"
    """A file (.txt, .jsonl, .csv, .tsv), or a shipped set: smoke, demo, demo-images."""
    limit: int | None = None
    """Only so many prompts."""
    methods: tuple[str, ...] = ()
    """fewer_steps, first_block_cache, sea_cache, ras, sla, ras_sla; with a setting after a colon:
    fewer_steps:8, first_block_cache:0.1, ras:fast, sla:my.yaml, ras_sla:fast+quality. Default: all."""
    crossover: Literal["auto", "never"] | None = None
    """Overrides that of all sparse attention."""
    batch_size: int = 1
    """Samples a pipeline call when sets are made. Seconds are always measured with one."""
    repeats: int = 5
    """Measured calls of each method."""
    metrics: tuple[str, ...] = ()
    """Default: PSNR, SSIM, what the networks allow, flicker of clips, the judge of demo prompts."""
    reference: Path | None = None
    """Real pictures that FID and its like compare with; default: the dense samples, and the names say so."""
    networks: OmitArgPrefixes[Networks] = field(default_factory=Networks)
    title: str | None = None
    """Of the report."""
    shown: int = 8
    """Samples in page and picture."""
    fail_if: FailIf = ()
    """Exit with 3 if this holds, as in "psnr<25" or "SLA balanced: speedup_total<1"; may be given several
    times."""
    overwrite: bool = False
    """Replace samples that were made with other settings."""

    def run(self) -> None:
        from dit_accel.eval.view.conditions import check_early

        check_early(self.fail_if)
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "metrics": self.metrics or None,
            "reference": self.reference,
            "networks": self.networks,
            "seed": self.seed,
            "fps": self.fps,
            "shown": self.shown,
            "fail_if": self.fail_if,
            "overwrite": self.overwrite,
        }
        found = self._preset(common) if self.preset == "demo" else self._one(common)
        _print_results(found, self.format)
        if self.format == "human":
            for folder in found:
                print_line(str(Path(folder) / "report.html"))
        _fail(list(found.values()), self.fail_if)

    def _preset(self, common: dict[str, Any]) -> dict[str, Results]:
        from dit_accel.eval.runs.presets import run_demo

        plain = Run(sampling=Sampling(num_inference_steps=self.sampling.num_inference_steps))
        for name in ("model", "sampling", "prompts", "methods", "crossover", "dtype", "revision",
                     "cpu_offload", "title"):  # fmt: skip
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(f"preset='demo': decides on {name} itself; accepted without it")
        steps = self.sampling.num_inference_steps
        found = run_demo(
            self.output_dir,
            limit=self.limit,
            num_inference_steps=steps,
            device=self.device,
            **common,
        )
        return {str(self.output_dir / name): results for name, results in found.items()}

    def _one(self, common: dict[str, Any]) -> dict[str, Results]:
        from dit_accel.eval.runs.methods import DEFAULT
        from dit_accel.eval.runs.run import run_evaluation
        from dit_accel.sampling.prompt_sets import load_prompts

        prompts = load_prompts(self.prompts, self.limit)
        own = sla_settings("auto", self.resolve()[0], self.hub)
        pipe, sampling = self.load()
        results = run_evaluation(
            pipe,
            prompts,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            methods=self.methods or DEFAULT,
            sla=own if isinstance(own, SLACheckpoint) else "balanced",
            crossover=self.crossover,
            revision=self.revision,
            title=self.title,
            **common,
        )
        return {str(self.output_dir): results}


@dataclass(kw_only=True)
class Eval:
    """What acceleration costs: samples, metrics, one table and one page."""

    command: (
        Annotated[Generate, subcommand("generate")]
        | Annotated[Score, subcommand("score")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Run, subcommand("run")]
    )

    def run(self) -> None:
        self.command.run()


def _fail(found: list[Results], conditions: tuple[str, ...]) -> None:
    from dit_accel.eval.view.conditions import check

    fail_on([reason for results in found for reason in check(results, conditions)])


def _print_results(found: Mapping[str, Results], format_: str) -> None:
    from dit_accel.eval.view.terminal import results_lines

    if format_ == "json":
        print_json(dict(found) if len(found) > 1 else next(iter(found.values())))
        return
    for folder, results in found.items():
        print_line(f"{results['title']} ({folder})")
        print_line("\n".join(results_lines(results)) + "\n")
