"""Draw 24 stills of an embedded image model under their captions: the first 16 training captions of the judge and the
first 8 held-out captions. Made assets/tiny-sd3.png and assets/tiny-lumina2.png.

python pipelines/stills_sheet.py tiny-sd3 sheet.png
"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from dit_accel.bench.stills_sheet import draw_stills


def main(model: Positional[str], output: Positional[Path]) -> None:
    """Sample and draw.

    Args:
        model: name of an embedded image model.
        output: PNG file to write.
    """
    draw_stills(model, output)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
