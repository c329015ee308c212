"""The command line, called in this process; and small sizes for it."""

from dit_accel.cli import main

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2"]
SMALL += ["--guidance-scale", "1", "--max-sequence-length", "16"]


def run(*arguments):
    """Exit code of the command line."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0
