"""`python -m dit_accel.finetune` is `dit-accel finetune`."""

import runpy
import sys

# By name, because imports run from the command line to this package and never back.
sys.argv[1:1] = ["finetune"]
runpy.run_module("dit_accel.cli", run_name="__main__")
