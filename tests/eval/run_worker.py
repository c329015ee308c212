"""A process of its own that evaluates: `run_worker.py REPOSITORY OUTPUT_DIR`.

DIE_AT=n: it kills itself in the n-th pipeline call.
"""

import os
import signal
import sys

import torch

from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.settings import Sampling

PROMPTS = [PromptRecord("a", "a red circle moving right"), PromptRecord("b", "a blue square")]
SAMPLING = Sampling(
    height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
    max_sequence_length=16,
)  # fmt: skip
FEW = ("fewer_steps:1", "ras", "sla")


def evaluate(pipe, folder, **changed):
    from dit_accel.config import RASConfig, SLAConfig
    from dit_accel.eval.runs.methods import DEFAULT
    from dit_accel.eval.runs.run import run_evaluation

    options = {
        "prompts": PROMPTS,
        "output_dir": folder,
        "model": "random-wan",
        "sampling": SAMPLING,
        # One row of fewer steps in any case: at this size nothing may be faster than dense sampling.
        "methods": (*DEFAULT, "fewer_steps:1"),
        "ras": RASConfig(warmup=1, tail=1, resets=()),
        "sla": SLAConfig(topk=0.5, block_q=16, block_k=16, crossover="never"),
        "repeats": 2,
        "progress": False,
    }
    return run_evaluation(pipe, **options | changed)


def main(repository, folder):
    import conftest  # noqa: F401  # makes torchvision importable where it needs help

    from dit_accel import SparseWanPipeline

    torch.set_num_threads(1)
    pipe = SparseWanPipeline.from_pretrained(repository, sla=None)
    decode, calls = pipe.vae.decode, []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == int(os.environ["DIE_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*arguments, **options)

    pipe.vae.decode = dying
    evaluate(pipe, folder, methods=FEW)


if __name__ == "__main__":
    main(*sys.argv[1:])
