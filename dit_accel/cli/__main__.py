"""Runs `dit-accel` as `python -m dit_accel.cli`."""

from dit_accel.cli import main

main()
