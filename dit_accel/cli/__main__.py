"""`python -m dit_accel.cli` is `dit-accel`."""

from dit_accel.cli import main

main()
