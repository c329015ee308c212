"""Calls of the command line in this process, and options for small samples."""

from dit_accel.cli import main

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2"]
SMALL += ["--guidance-scale", "1", "--max-sequence-length", "16"]


def run(*arguments):
    """Run the command line and return its exit code."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0
