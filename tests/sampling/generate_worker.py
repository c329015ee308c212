"""A process of its own that generates: `generate_worker.py REPOSITORY OUTPUT_DIR BATCH_SIZE`.

RANK and WORLD_SIZE as torchrun sets them. DIE_AT=n: the process kills itself while it writes frame n.
"""

import os
import signal
import sys

import torch

from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.settings import Sampling

PROMPTS = [
    PromptRecord("00000", "a red circle moving right"),
    PromptRecord("00001", "a blue square", seed=11),
    PromptRecord("00002", "a white cross", negative_prompt="a green triangle"),
    PromptRecord("00003", "a cyan circle moving down on a navy background"),
]
SAMPLING = Sampling(
    height=32,
    width=32,
    num_frames=5,
    num_inference_steps=2,
    guidance_scale=2.0,
    max_sequence_length=16,
)


def main(repository, output_dir, batch_size):
    from dit_accel import SparseWanPipeline
    from dit_accel.sampling import media
    from dit_accel.sampling.generate import generate

    torch.set_num_threads(1)
    write_png, written = media.write_png, []

    def dying(path, image):
        written.append(path)
        if len(written) == int(os.environ.get("DIE_AT", "0")):
            path.write_bytes(b"half a picture")
            os.kill(os.getpid(), signal.SIGKILL)
        write_png(path, image)

    media.write_png = dying
    generate(
        SparseWanPipeline.from_pretrained(repository, sla=None),
        PROMPTS,
        output_dir=output_dir,
        model="tiny",
        sampling=SAMPLING,
        batch_size=int(batch_size),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
