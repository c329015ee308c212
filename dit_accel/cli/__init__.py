"""The command line, `dit-accel`. Importing it loads nothing else, so that an interrupt is caught from the start."""

import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Run `dit-accel`: entry point of the console script.

    Args:
        argv: arguments. Default: those of the process.

    Raises:
        SystemExit: with the exit code, unless it is 0.
    """
    try:
        from dit_accel.cli.app import run

        run(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
