"""Run diffusers' own pipeline tests on plain, replaced and enabled pipelines, and compare the outcomes.

    python pipelines/diffusers_tests.py --diffusers ../diffusers --output pipelines/results/diffusers_tests.json
    python pipelines/diffusers_tests.py --diffusers diffusers.git --revision v0.40.0 --variants plain enable

A copy of the tests folder runs once for each variant, offline; tiny text encoders and tokenizers take the place of
those that the tests fetch from the hub. Exit code 1: a test passes with the plain pipelines and fails with a variant,
and no rule of ALLOWED (dit_accel/bench/diffusers_tests.py) names it. diffusers_tests_plugin.py applies the variants.
"""

import sys
from pathlib import Path

import tyro

from dit_accel.bench.diffusers_tests import DiffusersTests

if __name__ == "__main__":
    sys.exit(tyro.cli(DiffusersTests, description=__doc__).run(Path(__file__).resolve().parent))
