"""Draw a clip of the embedded model with sparse attention at several densities, and the blocks that one query block reads.

python pipelines/sla_pictures.py assets/sla.png
"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from dit_accel.bench.sla_pictures import draw_sla


def main(output: Positional[Path]) -> None:
    """Sample and draw.

    Args:
        output: PNG file to write.
    """
    draw_sla(output)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
