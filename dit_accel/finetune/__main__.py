"""`python -m dit_accel.finetune` is `dit-accel finetune`."""

import sys

from dit_accel.cli import main

main(["finetune", *sys.argv[1:]])
