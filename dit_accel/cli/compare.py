"""`dit-accel compare`."""

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from dit_accel.cli.options import AccelerationOptions, FailIf
from dit_accel.cli.printing import fail_on, print_line, print_results


@dataclass(kw_only=True)
class Compare(AccelerationOptions):
    """Compare dense and accelerated sampling of one prompt from the same noise: clips, contact sheet, PSNR, SSIM,
    seconds, density. `eval report` makes a page of the folder."""

    prompt: Positional[str]
    repeats: int = 1
    """Measured calls of each method; seconds are medians."""
    methods: tuple[str, ...] = ()
    """Further methods, as in `eval run`: fewer_steps (dense sampling in the time of each other method), step caches such
    as sea_cache, ras, sla, ras_sla, with a setting after a colon. A step cache without a setting gets one with which it
    costs as much as ras."""
    fail_if: FailIf = ()
    """Exit with 3 if this condition holds, as in "psnr<25" or "speedup_total<1.5". Can be repeated."""
    overwrite: bool = False
    """Replace an earlier comparison in the folder."""

    def run(self) -> None:
        from dit_accel.eval.view.conditions import check, check_early
        from dit_accel.sampling.prompts import number_prompts
        from dit_accel.sampling.settings import check_count

        prompts = number_prompts([self.prompt])
        check_count("repeats", self.repeats)
        settings: dict[str, Any] = {"sla": self.sla_config(), "ras": self.ras_config()}
        settings["crossover"] = self.crossover
        outline, sampling = self.check(prompts)
        from dit_accel.eval.results.types import RESULTS
        from dit_accel.eval.runs.compare import COMPARED, SHEET, compare, compared_methods

        check_early(self.fail_if, metrics=COMPARED)
        compared_methods(self.methods, outline, steps=outline.steps(sampling), **settings)
        if (self.output_dir / RESULTS).exists() and not self.overwrite:
            raise ValueError(
                f"output_dir={str(self.output_dir)!r}: already holds {RESULTS}; choose another or pass --overwrite"
            )
        results = compare(
            self.load_compiled(),
            self.prompt,
            output_dir=self.output_dir,
            model=self.model,
            sampling=sampling,
            seed=self.seed,
            repeats=self.repeats,
            methods=self.methods,
            fps=self.fps,
            overwrite=self.overwrite,
            **settings,
        )
        print_results({str(self.output_dir): results}, self.format, parts=True)
        if self.format == "human":
            for row in results["rows"]:
                for reason, n in row["settings"].get("dense_calls", {}).items():
                    print_line(f"{row['name']}: {n} calls dense: {reason}")
            files = {*results["samples"][0]["media"].values(), SHEET, RESULTS}
            files |= {"side_by_side.mp4", "side_by_side.png"}
            for path in sorted(x for x in self.output_dir.iterdir() if x.name in files):
                print_line(str(path))
        fail_on(check(results, self.fail_if))
