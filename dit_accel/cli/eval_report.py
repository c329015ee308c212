"""`dit-accel eval report`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dit_accel.cli.options import FailIf, Format
from dit_accel.cli.printing import fail_on, print_line, print_results


@dataclass(kw_only=True)
class Report:
    """Make table, picture and page again from the results.json of a folder.

    Exit codes: 0 done, 1 failed while running, 2 bad input or a --fail-if that cannot be decided, 3 a
    --fail-if condition holds, 130 interrupted.
    """

    folder: Positional[Path]
    """Folder with results.json and the samples that it names."""
    title: str | None = None
    """Title of the report. Default: that of the results."""
    shown: int = 8
    """Number of samples in page and picture."""
    fail_if: FailIf = ()
    """Exit with 3 if this condition holds, as in "psnr<25" or "SLA balanced: seconds_total>4". Can be repeated."""
    format: Format = "human"
    """How the result is printed on stdout."""

    def run(self) -> None:
        from dit_accel.eval.results.store import read_results
        from dit_accel.eval.view.conditions import check
        from dit_accel.eval.view.report import report

        if self.shown < 0:
            raise ValueError(f"shown={self.shown}: must be an int >= 0")
        reasons = check(read_results(self.folder), self.fail_if)
        written = report(self.folder, title=self.title, samples=self.shown)
        results = read_results(self.folder)
        print_results({str(self.folder): results}, self.format)
        if self.format == "human":
            for path in written.values():
                print_line(str(path))
        fail_on(reasons)
