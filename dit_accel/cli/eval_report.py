"""`dit-accel eval report`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dit_accel.cli.options import FailIf, Format
from dit_accel.cli.printing import fail_on, print_line, print_results


@dataclass(kw_only=True)
class Report:
    """Table, picture and page anew from the results.json of a folder.

    Exit codes: 0 done, 1 failed while running, 2 bad input or a --fail-if that cannot be decided, 3 a
    --fail-if condition holds, 130 interrupted.
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
    format: Format = "human"
    """How the result is printed on stdout."""

    def run(self) -> None:
        from dit_accel.eval.results.store import read_results
        from dit_accel.eval.view.conditions import check
        from dit_accel.eval.view.report import report

        if self.shown < 0:
            raise ValueError(f"shown={self.shown}: accepted is an int >= 0")
        reasons = check(read_results(self.folder), self.fail_if)
        written = report(
            self.folder, title=self.title, samples=self.shown, overwrite=self.overwrite
        )
        results = read_results(self.folder)
        print_results({str(self.folder): results}, self.format)
        if self.format == "human":
            for path in written.values():
                print_line(str(path))
        fail_on(reasons)
