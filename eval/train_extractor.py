"""Trains the shipped feature extractor from nothing; about three minutes on one CPU core.

python eval/train_extractor.py --output assets/tiny-extractor.safetensors
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from dit_accel.eval.metrics.tiny_extractor import ASSET, save_tiny_extractor, train_tiny_extractor


@dataclass
class Args:
    """Command line."""

    output: Path = Path("assets") / ASSET
    seed: int = 0
    steps: int = 3000
    batch_size: int = 64
    threads: int = 1


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    began, busy = time.perf_counter(), time.process_time()
    extractor = train_tiny_extractor(args.seed, args.steps, args.batch_size)
    save_tiny_extractor(extractor, args.output)
    seconds = f"{time.perf_counter() - began:.0f} s, {time.process_time() - busy:.0f} s of CPU"
    print(f"{args.output}: {args.output.stat().st_size} bytes, {seconds}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
