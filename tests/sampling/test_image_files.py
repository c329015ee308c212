"""Image files of common formats: read without loss, or refused by name."""

import numpy as np
import pytest
from PIL import Image, features

from dit_accel.sampling.image_files import IMAGE_SUFFIXES, read_image
from dit_accel.sampling.sets import SampleSet

FORMATS = {".jfif": "JPEG", ".jpe": "JPEG", ".dib": "DIB", ".avifs": "AVIF", ".pbm": "PPM"}
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".avif", ".avifs")


def smooth(size=(16, 24)):
    """Return a smooth image, which lossy formats change little."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([x * 10, y * 15, 128 + 0 * x], axis=-1).astype(np.uint8)


def write(path, pixels, mode="RGB", **options):
    if path.suffix.lower().startswith(".avif") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = Image.fromarray(pixels).convert(mode)
    image.save(path, format=FORMATS.get(path.suffix.lower()), **options)


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".BMP", ".TIFF", ".Jfif"])
def test_each_format_is_read(tmp_path, suffix):
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    options = {"lossless": True} if suffix == ".webp" else {}
    pixels = smooth()
    write(tmp_path / f"a{suffix}", pixels, mode, **options)
    write(tmp_path / "b.png", pixels)
    samples = SampleSet.open(tmp_path)
    assert samples.ids == ("a", "b")
    expected = np.asarray(Image.fromarray(pixels).convert(mode).convert("RGB"))
    error = abs(samples.frames("a")[0].astype(int) - expected)
    assert error.mean() < 4 if suffix.lower() in LOSSY else error.max() == 0


def test_frames_of_a_clip_in_another_format(tmp_path):
    (tmp_path / "clip").mkdir()
    for i in range(3):
        write(tmp_path / "clip" / f"{i}.bmp", smooth() + i)
    clips = SampleSet.open(tmp_path)
    assert (clips.kind, clips.ids) == ("clips", ("clip",))
    np.testing.assert_array_equal(clips.frames("clip")[:, 0, 0, 2], [128, 129, 130])


UNREAD = ["a.heic", "b.JXL", "c.exr", "d.dng", "e.svg", "f.psd", "g.jp2", "h.ico", "sub/i.Hdr"]


def test_pictures_that_are_not_read_are_named(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for name in [*UNREAD, "notes.txt", "sheet.csv", ".hidden.heic"]:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 \.heic \('a\.heic'\)"):
        SampleSet.open(tmp_path)
    write(tmp_path / "z.png", smooth())
    capsys.readouterr()
    assert SampleSet.open(tmp_path).ids == ("z",)
    said = capsys.readouterr().err
    assert all(name in said for name in UNREAD)
    assert all(name not in said for name in ("notes", "sheet", "hidden", "'z"))
    assert said.count("\n") == 1


def test_a_clean_folder_has_no_note(tmp_path, capsys):
    for name in ("a.png", "b.tif"):
        write(tmp_path / name, smooth())
    SampleSet.open(tmp_path)
    assert capsys.readouterr().err == ""


def deep_ppm(path):
    path.write_bytes(b"P6\n2 2\n65535\n" + bytes(range(24)))


def deep_pgm(path):
    path.write_bytes(b"P5\n2 2\n1023\n" + bytes(8))


def deep_text(path):
    path.write_bytes(b"P3\n1 1\n4095\n5 6 7\n")


def deep_tiff(path):
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(path)


def float_tiff(path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(path)


def two_pages(path):
    Image.fromarray(smooth()).save(
        path, save_all=True, append_images=[Image.fromarray(smooth() + 1)]
    )


def transparent(path):
    Image.fromarray(smooth()).convert("RGBA").point(lambda x: x // 2).save(path)


LOSSES = [(deep_ppm, "ppm"), (deep_pgm, "pgm"), (deep_text, "ppm"), (deep_tiff, "tif"), (float_tiff, "tiff"),
          (two_pages, "tif"), (transparent, "tif"), (transparent, "tga")]  # fmt: skip


@pytest.mark.parametrize(("draw", "suffix"), LOSSES, ids=[f"{x.__name__}-{y}" for x, y in LOSSES])
def test_what_rgb_would_lose_is_refused(tmp_path, draw, suffix):
    path = tmp_path / f"a.{suffix}"
    draw(path)
    with pytest.raises(ValueError, match=rf"a\.{suffix}: .*must be"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "ppm", "tga", "avif", "jfif"])
def test_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, smooth())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix}"):
        read_image(path)
