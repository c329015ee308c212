"""`dit-accel eval run`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from dit_accel.cli.options import FailIf, ModelOptions, SamplingOptions, sla_settings
from dit_accel.cli.printing import fail_on, print_line, print_results
from dit_accel.config import SLAConfig
from dit_accel.eval.metrics.networks import Networks

DEMO = {
    "tiny-wan": ("demo", 6, (9, 6)),
    "tiny-sd3": ("demo-images", 8, (15, 10)),
    "tiny-lumina2": ("demo-images", 8, (15, 10)),
}
"""Prompt set, number of prompts, and numbers of dense steps besides those at equal time, by embedded model."""


@dataclass(kw_only=True)
class Run(ModelOptions):
    """Compare dense sampling, dense sampling with fewer steps at equal time, step caches, RAS and SLA in one table and one
    page. A run that was killed goes on when it is started again.

    Exit codes: 0 done, 1 failed while running (what is finished stays), 2 bad input or a --fail-if that
    cannot be decided, 3 a --fail-if condition holds, 130 interrupted.
    """

    preset: Literal["none", "demo"] = "none"
    """demo: the embedded models, each in a sub-folder with its own page; a quarter of an hour on two cores."""
    prompts: str = "smoke"
    """Prompts: a file (.txt, .jsonl, .csv, .tsv), or a shipped set: smoke, demo, demo-images."""
    limit: int | None = None
    """Number of prompts. Default: all."""
    methods: tuple[str, ...] = ()
    """fewer_steps, ras, sla, ras_sla, and step caches: first_block_cache, sea_cache, mag_cache, taylorseer, pab,
    faster_cache; with a setting after a colon: fewer_steps:8, first_block_cache:0.1, ras:fast, sla:my.yaml,
    ras_sla:fast+quality. A step cache without a setting gets one with which it costs as much as ras. Default:
    fewer_steps, first_block_cache, sea_cache, ras, sla, ras_sla."""
    fine_steps: int | None = None
    """Steps of a second reference, dense sampling from the same noise. 0: none. Default: 100 with the preset demo,
    otherwise none."""
    crossover: Literal["auto", "never"] | None = None
    """Replaces the crossover of all sparse attention."""
    batch_size: int = 1
    """Samples per call when sets are made. Seconds are always measured with one."""
    repeats: int = 5
    """Measured calls of each method."""
    metrics: tuple[str, ...] = ()
    """Names of metrics. Default: PSNR, SSIM, metrics that the networks allow, flicker of clips, the judge of demo prompts."""
    reference: Path | None = None
    """Real pictures for FID and similar metrics. Default: the dense samples; the names of the metrics then say so."""
    networks: OmitArgPrefixes[Networks] = field(default_factory=Networks)
    title: str | None = None
    """Title of the report."""
    shown: int = 8
    """Number of samples in page and picture."""
    fail_if: FailIf = ()
    """Exit with 3 if this condition holds, as in "psnr<25" or "SLA balanced: speedup_total<1". Can be repeated."""
    overwrite: bool = False
    """Replace samples that were made with other settings."""

    def run(self) -> None:
        from dit_accel.eval.view.conditions import check, check_early
        from dit_accel.sampling.settings import check_count

        check_early(self.fail_if)
        check_count("repeats", self.repeats)
        for name in ("inception", "lpips"):
            path = getattr(self.networks, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}={str(path)!r}: no such file")
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "fine_steps": self.fine_steps or None,
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
        print_results(found, self.format)
        if self.format == "human":
            for folder in found:
                print_line(str(Path(folder) / "report.html"))
        fail_on([reason for results in found.values() for reason in check(results, self.fail_if)])

    def _preset(self, common: dict[str, Any]) -> dict[str, Any]:
        """Evaluate the embedded models, each in a sub-folder with its own page.

        Sequences of these models are shorter than the crossover, so sparse attention runs with crossover="never": it
        costs time here, and only its quality is of interest.
        """
        plain = Run(sampling=SamplingOptions(num_inference_steps=self.sampling.num_inference_steps))
        for name in ("model", "sampling", "prompts", "methods", "crossover", "dtype", "revision",
                     "cpu_offload", "title"):  # fmt: skip
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(f"{name}: not accepted with preset='demo'")
        if self.fine_steps is None:
            common["fine_steps"] = 100
        from dit_accel.eval.runs.caches import CACHES
        from dit_accel.eval.runs.run import Evaluation
        from dit_accel.sampling.prompt_sets import load_prompts

        runs = []
        for model, (prompts, few, more) in DEMO.items():
            one = replace(self, model=model, prompts=prompts, output_dir=self.output_dir / model)
            compared = load_prompts(prompts, few if self.limit is None else self.limit)
            outline, sampling = one.check(compared)
            steps = outline.steps(sampling)
            evaluation = Evaluation(
                prompts=compared,
                output_dir=one.output_dir,
                model=model,
                sampling=sampling,
                methods=(
                    *("fewer_steps", *(f"fewer_steps:{n}" for n in more if n < steps)),
                    *(*CACHES, "ras", "sla", "ras_sla"),
                ),
                sla=SLAConfig(block_q=16, block_k=16, crossover="never"),
                probes=load_prompts(prompts)[len(compared) :],
                **common,
            )
            evaluation.check(outline)
            runs.append((one, evaluation))
        return {str(x.output_dir): y.run(x.load()) for x, y in runs}

    def _one(self, common: dict[str, Any]) -> dict[str, Any]:
        """Evaluate one model."""
        from dit_accel.sampling.prompt_sets import load_prompts

        prompts = load_prompts(self.prompts, self.limit)
        own = sla_settings("auto", self.resolve()[0], self.hub)
        outline, sampling = self.check(prompts)
        from dit_accel.eval.runs.methods import DEFAULT
        from dit_accel.eval.runs.run import Evaluation, run_evaluation

        settings = {
            "output_dir": self.output_dir,
            "model": self.model,
            "sampling": sampling.filled({"num_inference_steps": outline.steps(sampling)}),
            "methods": self.methods or DEFAULT,
            "sla": "balanced" if isinstance(own, SLAConfig) else own,
            "crossover": self.crossover,
            "revision": self.revision,
            "title": self.title,
            "probes": load_prompts(self.prompts)[len(prompts) :],
            **common,
        }
        Evaluation(prompts=prompts, **settings).check(outline)
        return {str(self.output_dir): run_evaluation(self.load(), prompts, **settings)}
