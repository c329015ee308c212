"""The command line, `dit-accel`: one thin file a command."""

from dit_accel.cli.app import main

__all__ = ["main"]
