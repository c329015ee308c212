"""Decoding of stills and animated pictures."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from dit_accel.finetune.data.pictures import picture_frames, probe_picture
from dit_accel.finetune.data.reader import BrokenFileError

from .videos import mark_of, number_of, picture


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_stills(tmp_path, suffix):
    path = tmp_path / f"still.{suffix}"
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    Image.fromarray(picture(7)).save(path, **options)
    assert probe_picture(path, fps=None) == probe_picture(path, fps=16) == (48, 64, 1)
    (frame,) = picture_frames(path, fps=16)
    assert frame.dtype == np.uint8
    assert np.abs(frame[24:, 32:].astype(int) - picture(7)[24:, 32:]).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera(tmp_path, orientation):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(7)).save(path, exif=exif, quality=95)
    (frame,) = picture_frames(path, fps=None)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(frame, expected)
    assert probe_picture(path, fps=None)[:2] == expected.shape[:2]
    assert mark_of(frame) == mark_of(expected)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_have_times_of_their_own(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    images = [Image.fromarray(picture(i)) for i in range(6)]
    durations = [100, 100, 300, 100, 100, 100]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    assert [number_of(x) for x in picture_frames(path, fps=None)] == [0, 1, 2, 3, 4, 5]
    assert [number_of(x) for x in picture_frames(path, fps=10)] == [0, 1, 2, 2, 2, 3, 4, 5]
    assert probe_picture(path, fps=10) == (48, 64, 8)


def test_durations_that_browsers_ignore_count_as_theirs(tmp_path):
    path = tmp_path / "fast.gif"
    images = [Image.fromarray(picture(i)) for i in range(3)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=0)
    assert len(list(picture_frames(path, fps=20))) == 6


def test_damaged_pictures_are_refused_by_name(tmp_path):
    path = tmp_path / "still.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BrokenFileError, match=r"still.png: .*truncated"):
        probe_picture(path, fps=None)
    path.write_text("hello")
    with pytest.raises(BrokenFileError, match=r"still.png: .*picture"):
        probe_picture(path, fps=None)


def test_a_damaged_animation_ends_at_the_damage(tmp_path):
    path = tmp_path / "moving.gif"
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(8)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert 2 <= probe_picture(path, fps=None)[2] <= 6


def test_what_8_bits_cannot_show_is_refused(tmp_path):
    deep, clear = tmp_path / "deep.png", tmp_path / "clear.png"
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(deep)
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(clear)
    with pytest.raises(BrokenFileError, match=r"deep.png: .*8 bits"):
        probe_picture(deep, fps=None)
    with pytest.raises(BrokenFileError, match=r"clear.png: .*transparent"):
        probe_picture(clear, fps=None)
    moving = tmp_path / "clear.webp"
    images = [Image.fromarray(np.full((8, 8, 4), i, np.uint8)) for i in (9, 90)]
    images[0].save(moving, save_all=True, append_images=images[1:], duration=100, lossless=True)
    with pytest.raises(BrokenFileError, match=r"clear.webp: .*transparent"):
        probe_picture(moving, fps=None)
