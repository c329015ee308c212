"""Run `dit-accel finetune` as `python -m dit_accel.finetune`, for launchers such as torchrun."""

import runpy
import sys

# Run by name: this package must not import the command line, which imports this package.
sys.argv[1:1] = ["finetune"]
runpy.run_module("dit_accel.cli", run_name="__main__")
