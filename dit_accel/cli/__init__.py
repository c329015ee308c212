"""Command line `dit-accel`. This module imports nothing heavy, so that an interrupt during later imports is caught."""

import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Run `dit-accel`. Entry point of the console script.

    Args:
        argv: command line arguments. Default: `sys.argv[1:]`.

    Raises:
        SystemExit: the exit code is not 0.
    """
    try:
        from dit_accel.cli.app import run

        run(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
