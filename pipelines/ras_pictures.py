"""Draw the embedded models dense and with region-adaptive sampling, the tokens that ran, and the differences.

python pipelines/ras_pictures.py assets/ras.png
"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from dit_accel.bench.ras_pictures import draw_ras


def main(output: Positional[Path]) -> None:
    """Sample and draw.

    Args:
        output: PNG file to write.
    """
    draw_ras(output)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
