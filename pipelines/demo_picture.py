"""Draws the picture of `make demo` from the folder of an evaluation of an image model.

python pipelines/demo_picture.py demo-out --output demo-out/demo.png
"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from dit_accel.bench.demo_picture import draw


def main(folder: Positional[Path], output: Path, samples: int = 4) -> None:
    """Draw samples and differences.

    Args:
        folder: folder of `dit-accel eval run`.
        output: PNG file to write.
        samples: number of samples.
    """
    draw(folder, output, samples)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
