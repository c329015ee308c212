"""Decoding of real video files."""

import subprocess

import numpy as np
import pytest

from dit_accel.finetune.data.reader import BrokenFileError
from dit_accel.finetune.data.video import probe_video, video_frames

from .videos import mark_of, number_of, write_clip

av = pytest.importorskip("av")

CODECS = {
    "h264 mp4": ("libx264", "mp4", {}),
    "h264 mkv": ("libx264", "mkv", {}),
    "h264 ts": ("libx264", "ts", {}),
    "h264 avi": ("libx264", "avi", {}),
    "h265 mp4": ("libx265", "mp4", {"options": {"x265-params": "log-level=none"}}),
    "mpeg4 mp4": ("mpeg4", "mp4", {"options": {"qmin": "1", "qmax": "2"}}),
    "mpeg4 avi": ("mpeg4", "avi", {"options": {"qmin": "1", "qmax": "2"}}),
    "vp8 webm": ("libvpx", "webm", {"options": {"b": "1M"}}),
    "vp9 webm": ("libvpx-vp9", "webm", {}),
    "av1 mkv": ("libsvtav1", "mkv", {}),
    "prores mov": ("prores_ks", "mov", {"pix_fmt": "yuv422p10le"}),
    "ffv1 mkv": ("ffv1", "mkv", {"pix_fmt": "yuv444p"}),
    "mpeg2 mpg": ("mpeg2video", "mpg", {"fps": 25}),
    "mjpeg mov": ("mjpeg", "mov", {"pix_fmt": "yuvj420p"}),
}


def facts(path, fps=None, start=0.0, end=None, most=None):
    return probe_video(path, fps=fps, start=start, end=end, most=most)


def numbers(path, fps=None, start=0.0, end=None):
    return [number_of(x) for x in video_frames(path, fps=fps, start=start, end=end)]


@pytest.mark.parametrize("name", CODECS)
def test_codecs_and_containers(tmp_path, name):
    codec, suffix, options = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write_clip(tmp_path / f"clip.{suffix}", 20, codec=codec, **options)
    assert facts(path) == (48, 64, 20)
    assert numbers(path) == list(range(20))
    fps = options.get("fps", 10)
    assert facts(path, fps / 2) == (48, 64, 10)
    assert numbers(path, fps / 2) == list(range(0, 20, 2))
    assert facts(path, most=7)[2] == 7


def test_colours_are_those_of_the_pictures(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", 3, codec="ffv1", pix_fmt="yuv444p")
    frame = next(video_frames(path, fps=None))
    assert frame.dtype == np.uint8
    assert np.abs(frame[0, 0].astype(int) - (250, 0, 0)).max() <= 2
    assert np.abs(frame[-1, -1].astype(int) - 10).max() <= 2


@pytest.mark.parametrize("hflip", [False, True], ids=["", "flipped"])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_that_of_ffmpeg(tmp_path, rotation, hflip):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_clip(tmp_path / "clip.mp4", 1, rotation=rotation, hflip=hflip)
    frame = next(video_frames(path, fps=None))
    height, width = (64, 48) if rotation % 180 else (48, 64)
    assert frame.shape == (height, width, 3)
    assert facts(path) == (height, width, 1)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    raw = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True
    ).stdout
    expected = np.frombuffer(raw, np.uint8).reshape(height, width, 3)
    assert mark_of(frame) == mark_of(expected)
    assert np.abs(frame.astype(int) - expected).mean() < 3


def test_other_angles_are_refused(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 1, rotation=30)
    with pytest.raises(BrokenFileError, match=r"clip.mp4: .*degrees.* 90"):
        facts(path)


@pytest.mark.parametrize("size", [(47, 63), (16, 2), (131, 17)], ids=str)
def test_odd_sizes(tmp_path, size):
    path = write_clip(
        tmp_path / "clip.mkv", 2, codec="ffv1", pix_fmt="yuv444p", height=size[0], width=size[1]
    )
    assert facts(path) == (*size, 2)
    assert next(video_frames(path, fps=None)).shape == (*size, 3)


def test_pixels_that_are_not_square(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 2, aspect="4/3")
    assert facts(path) == (48, 85, 2)


def test_sound_is_ignored(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 20, audio=True)
    assert facts(path, 10) == (48, 64, 20)
    assert numbers(path, 10) == list(range(20))


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_variable_frame_rate(tmp_path, suffix, codec):
    times = [0, 33, 67, 100, 500, 533, 567, 1500, 1533, 1600]
    path = write_clip(tmp_path / f"clip.{suffix}", 10, codec=codec, times=times)
    assert numbers(path) == list(range(10))
    expected = [0, 3, 3, 3, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 7, 9]
    assert numbers(path, 10)[:17] == expected
    assert facts(path, 10)[2] == len(numbers(path, 10))


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("ts", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mjpeg"),
    ],
)
def test_parts(tmp_path, suffix, codec):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_clip(
        tmp_path / f"clip.{suffix}", 45, codec=codec, pix_fmt=pix_fmt, options={"g": "10"}
    )
    assert numbers(path, 10, 2.0, 3.0) == list(range(20, 30))
    assert facts(path, 10, 2.0, 3.0)[2] == 10
    assert numbers(path, 5, 2.0) == list(range(20, 45, 2))
    assert numbers(path, 10, 2.6, 2.9) == [26, 27, 28]
    with pytest.raises(BrokenFileError, match=r"no frame .*9 s"):
        facts(path, 10, 9.0)


FASTSTART = {"container_options": {"movflags": "faststart"}}
CUT = {
    "h264 mp4": ("libx264", "mp4", FASTSTART),
    "h265 mp4": ("libx265", "mp4", {**FASTSTART, "options": {"x265-params": "log-level=none"}}),
    "h264 mkv": ("libx264", "mkv", {}),
    "h264 ts": ("libx264", "ts", {}),
    "vp9 webm": ("libvpx-vp9", "webm", {}),
    "mpeg4 avi": ("mpeg4", "avi", {"options": {"qmin": "1", "qmax": "2"}}),
    "prores mov": ("prores_ks", "mov", {"pix_fmt": "yuv422p10le", **FASTSTART}),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_was_cut_off_ends_there(tmp_path, name):
    """The frames before the cut are all there, in their order, none twice and none left out."""
    codec, suffix, options = CUT[name]
    whole = write_clip(tmp_path / f"whole.{suffix}", 40, codec=codec, **options)
    data = whole.read_bytes()
    path = tmp_path / f"cut.{suffix}"
    lengths = []
    for part in (0.95, 0.9, 0.85):
        path.write_bytes(data[: int(len(data) * part)])
        found = numbers(path, 10)
        assert found == list(range(len(found)))
        assert facts(path, 10)[2] == len(found)
        lengths.append(len(found))
    assert 40 >= lengths[0] >= lengths[1] > lengths[2] > 4


def test_damage_inside_ends_the_video(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 40)
    data = bytearray(path.read_bytes())
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    at = first + int(0.9 * (last - first))
    data[at : at + 30] = bytes(30)
    path.write_bytes(data)
    found = numbers(path, 10)
    assert found == list(range(len(found)))
    assert 4 < len(found) < 40


def test_files_that_are_no_video_are_refused_by_name(tmp_path):
    cut = write_clip(tmp_path / "whole.mp4", 20)
    cases = {
        "text.mp4": b"hello",
        "empty.mp4": b"",
        "no-index.mp4": cut.read_bytes()[:2000],
        "playlist.mp4": f"#EXTM3U\n#EXTINF:1,\nfile://{cut}\n#EXT-X-ENDLIST\n".encode(),
        "concat.mp4": f"ffconcat version 1.0\nfile {cut}\n".encode(),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BrokenFileError, match=rf"{name}: .*video"):
            facts(tmp_path / name)
    with pytest.raises(BrokenFileError, match=r"none.mp4: .*\(No such file"):
        facts(tmp_path / "none.mp4")


def test_a_sound_file_has_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BrokenFileError, match=r"sound.mp4: .*no video.*audio"):
        facts(path)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, name):
    path = write_clip(tmp_path / "clip.mp4", 2, color_trc=transfer)
    with pytest.raises(BrokenFileError, match=rf"HDR .*\({name}\)"):
        facts(path)


@pytest.mark.parametrize("name", ["a:b.mp4", "frame%03d.mp4", "pipe:0.mp4", "ünïcode clip.mp4"])
def test_names_mean_nothing_to_ffmpeg(tmp_path, monkeypatch, name):
    from pathlib import Path

    write_clip(tmp_path / "plain.mp4", 3).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert facts(Path(name)) == (48, 64, 3)
