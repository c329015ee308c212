"""`dit-accel compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from dit_accel.cli.options import AccelerationOptions, FailIf
from dit_accel.cli.printing import fail_on, print_json, print_line


@dataclass(kw_only=True)
class Compare(AccelerationOptions):
    """Same seed dense and accelerated: side-by-side clip, contact sheet, PSNR, SSIM, seconds, density."""

    prompt: Positional[str]
    repeats: int = 1
    """Measured runs of each kind; the median counts."""
    methods: tuple[str, ...] = ()
    """Further methods to run, as in `eval run`: fewer_steps (dense sampling in the time of the others),
    step caches such as sea_cache, ras, sla, ras_sla, with a setting after a colon. A step cache without a setting gets
    one with which it costs what ras costs."""
    fail_if: FailIf = ()
    """Exit with 3 if this holds, as in "psnr<25" or "speedup_total<1.5"; may be given several times."""
    overwrite: bool = False
    """Replace an earlier comparison in the folder."""

    def run(self) -> None:
        from dit_accel.eval.view.conditions import check, check_early
        from dit_accel.sampling.prompts import number_prompts
        from dit_accel.sampling.settings import check_count

        prompts = number_prompts([self.prompt])
        check_count("repeats", self.repeats)
        sla, ras = self.sla_config(), self.ras_config()
        if sla is None and ras is None:
            raise ValueError(
                "sla='none', ras='none': nothing to compare; accepted is at least one preset or YAML file"
            )
        outline, sampling = self.check(prompts)
        from dit_accel.eval.runs.compare import COMPARED, RECORD, as_results, compare
        from dit_accel.eval.runs.methods import check_fewer, read_methods

        check_early(self.fail_if, metrics=COMPARED)
        chosen = read_methods(self.methods, outline, crossover=self.crossover)
        check_fewer(chosen, outline.steps(sampling))
        if (self.output_dir / RECORD).exists() and not self.overwrite:
            raise ValueError(
                f"output_dir={str(self.output_dir)!r}: already holds {RECORD}; choose another or pass --overwrite"
            )
        pipe = self.load_compiled()
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
