"""Input images of image-to-video models."""

import pytest
from PIL import Image

from dit_accel.sampling.input_image import read_input_image, size_for_image
from dit_accel.sampling.outline import read_outline


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_pictures_of_any_mode_are_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.new(mode, (8, 6)).save(path)
    picture = read_input_image(str(path))
    assert (picture.mode, picture.size) == ("RGB", (8, 6))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_picture_is_refused_by_name(tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image=.*picture\.png"):
        read_input_image(str(path))


def test_a_truncated_picture_and_none_at_all_are_refused(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    for name in (path, tmp_path, tmp_path / "none.png", "https://example.org/picture.png"):
        with pytest.raises(ValueError, match="image="):
            read_input_image(str(name))


@pytest.mark.parametrize(
    "shape", [(832, 480), (480, 832), (100, 100), (3000, 10), (1, 1), (7, 2000)]
)
def test_the_size_keeps_the_shape_of_the_picture(wan_repository, shape):
    outline = read_outline(wan_repository)
    size = size_for_image(Image.new("RGB", shape), outline)
    outline.check_sizes(**size, num_frames=5)
    if max(shape) / min(shape) < 10:
        assert size["width"] / size["height"] == pytest.approx(shape[0] / shape[1], rel=0.06)
        assert size["width"] * size["height"] == pytest.approx(480 * 832, rel=0.06)
