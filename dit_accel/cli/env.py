"""Command `dit-accel env`."""

from dataclasses import dataclass

from dit_accel.cli.options import Format
from dit_accel.cli.printing import print_json, print_line


@dataclass(kw_only=True)
class Env:
    """Print versions and hardware for bug reports."""

    format: Format = "human"
    """Format of the result on stdout."""

    def run(self) -> None:
        from dit_accel.environment import machine, versions

        facts = {**versions(), **machine()}
        if self.format == "json":
            print_json(facts)
            return
        for key, value in facts.items():
            print_line(f"{key:14} {value}")
