"""The picture that an image-to-video clip begins with."""

import math
from pathlib import Path
from typing import Any


def read_picture(path: str) -> Any:
    """Read a picture file as RGB.

    Raises:
        ValueError: no such file, or not a readable picture; the message names `image`.
    """
    from diffusers.utils import load_image
    from PIL import Image

    if not Path(path).is_file():
        raise ValueError(f"image={path!r}: no such file; accepted is a picture file")
    try:
        return load_image(path)
    # What Pillow raises depends on where a damaged file breaks off.
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image={path!r}: not a readable picture ({error})") from None


def picture_size(picture: Any, outline: Any, area: int = 480 * 832) -> dict[str, int]:
    """Return the height and width of a clip that keeps the shape of a picture.

    Args:
        picture: the first picture.
        outline: the repository, whose sizes are multiples of a step.
        area: pixels of a frame, about.
    """
    step = max(16, outline.vae_scale_factor_spatial * outline.transformer.config.patch_size[1])
    root = math.sqrt(area * picture.height / picture.width)
    height = max(step, round(root / step) * step)
    width = max(step, round(root * picture.width / picture.height / step) * step)
    return {"height": height, "width": width}
