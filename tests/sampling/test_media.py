"""Video and image files: written frames are read back."""

import subprocess
import sys

import numpy as np
import pytest

from dit_accel.sampling import media


@pytest.fixture
def frames():
    t, h, w = np.meshgrid(np.arange(6), np.arange(32), np.arange(48), indexing="ij")
    return np.stack([t * 40, h * 7, w * 5], axis=-1).astype(np.uint8)


def test_mp4_reads_back_close_to_the_frames(frames, tmp_path):
    import imageio.v3 as iio

    [path] = media.write_clip(tmp_path / "0000", frames, kind="mp4", fps=8)
    again = iio.imread(path)
    assert again.shape == frames.shape
    assert np.abs(again.astype(int) - frames).mean() < 4  # chroma subsampling
    assert iio.immeta(path)["fps"] == 8


def test_gif_and_png_read_back(frames, tmp_path):
    from PIL import Image

    [gif] = media.write_clip(tmp_path / "0001", frames, kind="gif", fps=10)
    with Image.open(gif) as image:
        assert image.n_frames == len(frames)
    paths = media.write_clip(tmp_path / "0002", frames, kind="png", fps=10)
    assert len(paths) == len(frames)
    np.testing.assert_array_equal(np.asarray(Image.open(paths[3])), frames[3])


def test_to_uint8_rounds_and_clips():
    x = np.array([-1.0, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 5, 1).repeat(3, axis=-1)
    assert media.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_tiny_clips_are_enlarged_by_whole_pixels(frames):
    large = media.enlarge(frames, smallest_side=64)
    assert large.shape == (6, 64, 96, 3)
    np.testing.assert_array_equal(large[:, ::2, ::2], frames)
    both = media.side_by_side([("dense", frames), ("sparse", frames)])
    assert both.shape[0] == 6
    assert both.shape[2] == 2 * frames.shape[2] * 8 + 8
    sheet = media.contact_sheet([("a", frames), ("b", frames)], columns=3, tile=32)
    assert sheet.shape == (2 * (32 + 22), 3 * 48 + 2 * 4, 3)


def test_a_video_that_is_cut_off_is_an_error_and_no_file(tmp_path):
    """ffmpeg fails only at the end of the file, as on a full disk."""
    code = """
import resource, sys
import subprocess
import sys

import numpy as np
from pathlib import Path
from dit_accel.sampling import media
frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
path = Path(sys.argv[1]) / "clip.mp4"
try:
    media.write_video(path, frames, fps=16)
except OSError as error:
    assert error.filename == str(path), error
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 7
    assert list(tmp_path.iterdir()) == []
