"""Input image of an image-to-video pipeline."""

import math
from pathlib import Path
from typing import Any


def read_input_image(path: str) -> Any:
    """Return an image file as an RGB image of Pillow.

    Raises:
        ValueError: the file does not exist or cannot be read as an image; the message names `image`.
    """
    from diffusers.utils import load_image
    from PIL import Image

    if not Path(path).is_file():
        raise ValueError(f"image={path!r}: no such file; must be an image file")
    try:
        return load_image(path)
    # Pillow raises different errors depending on where a file is damaged.
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image={path!r}: not a readable image ({error})") from None


def size_for_image(image: Any, outline: Any, area: int = 480 * 832) -> dict[str, int]:
    """Return the height and width of a clip with the aspect ratio of an image.

    Args:
        image: input image.
        outline: outline of the repository. Sizes are multiples of its spatial scale factor times its patch size.
        area: approximate number of pixels of a frame.
    """
    step = max(16, outline.vae_scale_factor_spatial * outline.transformer.config.patch_size[1])
    root = math.sqrt(area * image.height / image.width)
    height = max(step, round(root / step) * step)
    width = max(step, round(root * image.width / image.height / step) * step)
    return {"height": height, "width": width}
